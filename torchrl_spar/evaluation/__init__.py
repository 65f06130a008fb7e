"""Roll-outs of a policy, beside training or in line; saved policies; scores."""
