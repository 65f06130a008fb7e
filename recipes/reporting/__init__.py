"""What report.py makes of finished runs: tables, statistics, figures."""
