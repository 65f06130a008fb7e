"""The README files: examples run, commands are accepted, links and tables hold, numbers are the committed ones."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import warnings
from collections import defaultdict
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SHARED, build_loss, compose_recipe, run

import torchrl_spar

pytest.importorskip("hydra")
import compare
from claim import NAMES as CLAIMS
from harness.launch import check_sweeps
from harness.sensor_faults import shares_of_faults
from hydra.core.override_parser.overrides_parser import OverridesParser

ROOT = Path(__file__).resolve().parents[2]
RECIPES, RESULTS = ROOT / "recipes", ROOT / "recipes" / "results"
READMES = [ROOT / "README.md", *sorted(path for room in ("recipes", "tests", "torchrl_spar")
                                       for path in (ROOT / room).rglob("README.md"))]  # fmt: skip
EMBEDDED = "torchrl-spar-hopper-medium-v0"
HALFCHEETAH = SHARED / "minari" / "spar" / "halfcheetah" / "medium-v0"
each_readme = pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


def tables(text: str) -> list[list[list[str]]]:
    """Every table's rows of cells, as GitHub splits them."""
    found = re.findall(r"(?:^\|.*\n)+", without_code(text) + "\n", flags=re.M)
    return [[[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in table.splitlines()]
            for table in found]  # fmt: skip


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings."""
    titles = re.findall(r"^#+ (.*)", without_code(text), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_readme_is_tested():
    rooms = {str(path.parent.relative_to(ROOT)) for path in READMES}
    assert rooms >= {".", "recipes", "recipes/results", "recipes/claims", "recipes/benchmarks", "tests", "torchrl_spar"}


@each_readme
def test_every_link_leads_somewhere(path):
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text()))
    assert links
    for link in links:
        if link.startswith("https://"):
            continue
        name, _, heading = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        if heading:
            assert heading in anchors((target / "README.md" if target.is_dir() else target).read_text()), link


@each_readme
def test_every_table_is_one(path):
    found = tables(path.read_text())
    assert found
    for header, rule, *rows in found:
        assert rows, header
        assert all(re.fullmatch(":?-+:?", cell) for cell in rule), header
        for row in rows:
            assert len(row) == len(header) == len(rule), row


def commands() -> list[str]:
    """Every command of the README files that starts one of our programs, without comments and placeholders."""
    found = []
    for path in READMES:
        text = path.read_text()
        shell = "".join(blocks(text, "sh")).replace("\\\n", "").splitlines()
        inline = re.findall(r"`([^`\n]+)`", without_code(text))
        found += [part.split("  #")[0].strip() for line in (*shell, *inline) for part in line.split(" && ")]
    return sorted({line for line in found if line.startswith(("python ", "pytest ")) and "NAME" not in line})


def single(option: str) -> str:
    """The first value of a swept option."""
    parsed = OverridesParser.create().parse_override(option)
    if not parsed.is_sweep_override():
        return option
    return f"{parsed.get_key_element()}={next(parsed.sweep_string_iterator())}"


@pytest.mark.parametrize("command", commands())
def test_every_command_is_accepted(command):
    program, *words = shlex.split(command)
    paths = [word for word in words if word.startswith(("recipes/", "tests/", "torchrl_spar/"))]
    # A report takes one method of a folder as FOLDER@METHOD.
    assert not [path for path in paths if not list(ROOT.glob(path.partition("@")[0]))]
    # iql_trainer registers TorchRL's configs, which would stay for all tests; test_configs runs it.
    without_options = ("tests/", "recipes/report.py", "recipes/iql_trainer.py", "recipes/reproduce_d4rl.py")
    if program == "pytest" or words[0].startswith(without_options):
        return
    script, options = Path(words[0]).stem, words[1:]
    if script == "claim":
        assert options[0] in CLAIMS
        script, options = f"claims/{options[0]}", options[1:]
    if script in ("compare", "spar_offline_to_online"):
        check_sweeps(options, compare.SWEEPS)
    # Launchers are plugins that may not be installed.
    compose_recipe(script, *(single(option) for option in options if not option.startswith("hydra/")))


@pytest.fixture
def short(monkeypatch, tmp_path):
    """Runs an example of the first page with three steps where it has thousands."""
    few = {"steps": 3}
    monkeypatch.setattr(torchrl_spar, "pretrain", partial(torchrl_spar.pretrain, anchor=few, vae=few, critics=few))
    monkeypatch.chdir(tmp_path)

    def run(code: str) -> dict:
        torch.manual_seed(0)
        np.random.seed(0)
        names: dict = {}
        exec(code.replace("24_000", "3").replace('"recipes/', f'"{RECIPES}/'), names)
        return names

    return run


def test_the_example_trains_a_policy(short):
    use, _ = blocks((ROOT / "README.md").read_text(), "python")
    names = short(use)
    observation = names["data"].sample()["observation"]
    policy, anchor = names["loss"].actor, names["loss"].anchor
    assert all(value.isfinite().all() for value in names["losses"].values())
    assert not torch.equal(policy(observation=observation), anchor(observation=observation))


@pytest.fixture
def own_networks(short, monkeypatch):
    """Runs the package's example of own networks, and what goes on from it."""
    for name in ("fit_anchor", "fit_vae", "fit_critics"):
        monkeypatch.setattr(torchrl_spar, name, partial(getattr(torchrl_spar, name), steps=3))
    own, *others = blocks((ROOT / "torchrl_spar" / "README.md").read_text(), "python")[-4:]
    return lambda *chosen: short("".join([own, *(others[i] for i in chosen)]))


def test_the_example_of_own_networks_trains_them(own_networks):
    names = own_networks()
    loss, batch = names["loss"], names["data"].sample()
    assert torch.equal(loss.anchor(batch.clone())["action"], names["anchor"](batch.clone())["action"])
    assert all(value.isfinite().all() for value in loss(batch).values())


@pytest.mark.parametrize("example", [1, 2], ids=["separate", "shared"])
def test_the_examples_beside_iql_train_both(own_networks, example):
    start, names = own_networks(0), own_networks(0, example)
    moved = {
        (loss, network): not (
            names[loss]._modules[f"{network}_params"].data == start[loss]._modules[f"{network}_params"].data
        ).all()
        for loss in ("loss", "iql")
        for network in ("actor_network", "qvalue_network", "target_qvalue_network")
    }
    assert all(moved.values()), moved
    loss, iql = names["loss"], names["iql"]
    assert (iql.qvalue_network_params is loss.qvalue_network_params) == (example == 2)
    assert torch.equal(loss.reward_scale, start["loss"].reward_scale) and loss.reward_scale != 1


def test_a_log_becomes_a_policy_in_its_units(short):
    _, own = blocks((ROOT / "README.md").read_text(), "python")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="log.npz")  # the loader's, about data that looks wrong
        names = short(own)
    log, rows = names["log"], names["data"][:]
    known = ~log["timeouts"]  # the observation after a cut is not in the log
    assert torch.equal(rows["action"], torch.from_numpy(log["actions"][known]).float())
    assert torch.equal(names["action"], names["loss"].actor(observation=torch.zeros(11)))
    random = names["policy"](observation=100 * rows["observation"].std(0) * torch.randn(1000, 11))
    low, high = torch.tensor([-40.0, 0.0]), torch.tensor([40.0, 1.0])
    assert ((low <= random) & (random <= high)).all()
    assert (random.amax(0) - random.amin(0) > 0.5 * (high - low)).all(), "the actions are in the units of the log"


def test_the_package_readme_names_every_module_and_metric():
    text = (ROOT / "torchrl_spar" / "README.md").read_text()
    modules = [path.name for path in (ROOT / "torchrl_spar").glob("[a-z]*.py")]
    assert modules and not [name for name in modules if f"({name})" not in text]
    metrics = [*build_loss().out_keys, "loss_bc"]
    assert not [name for name in metrics if f"`{name}`" not in text]


def test_the_recipes_readme_names_every_script():
    text = (RECIPES / "README.md").read_text()
    scripts = [path.name for path in RECIPES.glob("*.py")]
    assert scripts and not [name for name in scripts if f"({name})" not in text]


@pytest.mark.slow
def test_the_results_are_the_committed_runs(tmp_path):
    readme = "".join(path.read_text() for path in RESULTS.rglob("README.md"))
    # With runs of the same data sets in compare/.
    rivals = ["@bc", "@bc10", "@td3_bc", "@iql"]
    beside = (("six_sets", rivals, 6), ("compare", [], 11), ("ablations", ["@spar"], 3))
    beside += ((f"ablations/{EMBEDDED}", ["@spar"], 17),)
    for name, methods, count in beside:
        shown = (RESULTS / name / "report.md").read_text()
        # The ablations without runs on every set are shown in the table of the embedded one alone, rivals in their own.
        rows = [row for row in shown.splitlines() if row.startswith("| ") and " | - | - |" not in row]
        assert len(rows) >= count + 4 and all(row in readme for row in rows)
        # The report is of the committed runs.
        copy = tmp_path / name.replace("/", "-")
        shutil.copytree(RESULTS / name, copy)
        others = [f"{RESULTS / 'compare'}{method}" for method in methods]
        done = run("report", copy, *others, cwd=tmp_path)
        assert done.stdout == shown, done.stderr


def test_the_first_pages_results_are_the_reports():
    reported = tables((RESULTS / "six_sets" / "report.md").read_text())[0]
    scores = {row[0]: [re.sub(r" \(\d\)$", "", cell) for cell in row[1:7]] for row in reported[2:]}
    (shown,) = [table for table in tables((ROOT / "README.md").read_text()) if table[0][0] == "method"]
    assert len(shown) > 4
    for method, *cells in shown[2:]:
        assert cells == scores[method]


def test_what_settled_critics_change_is_the_committed_runs():
    sets = [cell for cell in tables((RESULTS / "six_sets" / "report.md").read_text())[0][0] if "-v0" in cell]
    assert len(sets) == 6

    def scores(file: str, method: str) -> np.ndarray:
        lines = [json.loads(line) for line in (RESULTS / file).read_text().splitlines()]
        runs = [lines[0]["common"] | line for line in lines[1:]]
        mine = [run for run in runs if run["method"] == method]
        return np.array([np.mean([run["spar"]["normalized"] for run in mine if run["dataset"] == of]) for of in sets])

    files = "six_sets/runs.jsonl", "search/never_settled.jsonl"
    spar, no_lsi = ([scores(file, method) for file in files] for method in ("spar", "no_lsi"))
    (shown,) = [table for table in tables((RESULTS / "README.md").read_text()) if table[-1][0].startswith("its lead")]
    for row, values in zip(shown[2:], [*spar, *(a - b for a, b in zip(spar, no_lsi))], strict=True):
        assert row[1:] == [f"{value:.1f}" for value in (*values, values.mean())], row[0]


def test_the_settings_of_the_rivals_are_the_committed_runs():
    scores = defaultdict(list)
    for one in runs_of("grid/runs.jsonl"):
        scores[one["method"], one["seed"]].append(one["policy"]["normalized"])
    assert all(len(found) == 6 for found in scores.values())
    (shown,) = [table for table in tables((RESULTS / "README.md").read_text()) if table[0][0] == "development seed"]
    assert sum(cell != "" for _, *cells in shown[2:] for cell in cells) == len(scores) > 0
    td3_bc, iql = (0.25, 0.5, 1, 2.5), (0.3, 1, 3)
    for seed, *cells in shown[2:]:
        for cell, method in zip(cells, [f"td3_bc-{x}" for x in td3_bc] + [f"iql-{x}" for x in iql], strict=True):
            assert cell == (f"{np.mean(found):.1f}" if (found := scores.get((method, int(seed)))) else ""), method


def test_the_figures_of_off_policy_evaluation_are_the_studies():
    readme, files = (RESULTS / "ope" / "README.md").read_text(), sorted((RESULTS / "ope").glob("*.json"))
    assert files
    studies = {file.stem: json.loads(file.read_text()) for file in files}
    by = ("highest value", "highest lower bound", "surest gain, else the anchor", "longest training")
    for name, found in studies.items():
        regret = ["-" if (x := found["regret"].get(one)) is None else f"{x:.1f}"
                  for one in (*by, "critics' own value", "any")]  # fmt: skip
        numbers = [f"{found['policies']}", f"{found['spearman']:.2f}", f"{found['spearman_of_truth']:.2f}"]
        error, coverage = f"{found['mean_absolute_error']:.0f}", f"{found['coverage']:.0%}".replace("%", " %")
        cells = [name, *numbers, error, *regret, coverage]
        assert f"| {' | '.join(cells)} | {found['cpu_seconds_per_policy']:.0f} |" in readme
    prose = " ".join(readme.split())
    mean = np.mean([found["spearman"] for found in studies.values()])
    assert f"of 0.7 in the mean ({'met' if mean >= 0.7 else 'missed'}: {mean:.2f})" in prose
    missed = [name for name, found in studies.items() if found["regret"]["highest value"] > 5]
    assert f"at most 5 points by the highest value ({missed_on(missed)})" in prose
    missed = [name for name, found in studies.items() if found["safe_choice"]["worse_than_anchor"]]
    assert f"below its anchor ({missed_on(missed)})" in prose
    runs = sum(len(found["safe_choice"]["runs"]) for found in studies.values())
    assert f"by more than 3 points**, in {runs} runs on the four sets" in prose and len(studies) == 4
    kept = {name: f"{found['safe_choice']['gain_kept']:.0%}".replace("%", " %") for name, found in studies.items()}
    assert f"it keeps {kept['embedded']} on the embedded data and {kept['hopper-medium']} on hopper-medium, " in prose
    assert f"{kept['hopper-medium-expert']} on medium-expert, " in prose and kept["walker2d-medium"] == "0 %"
    peer, rows = studies["embedded"]["d3rlpy"], studies["embedded"]["rows"]
    own = np.mean([abs(row["value"] - row["true_value"]) for row in rows])
    assert f"ranks with {peer['spearman']:.2f}; its mean error is {peer['mean_absolute_error']:.0f}" in prose
    assert f"where ours is {own:.0f}" in prose and peer["steps"] == 10_000
    missed = [name for name, found in studies.items() if found["safe_choice"]["gain_kept"] < 0.8]
    assert f"80 % of the possible gain kept ({missed_on(missed)})" in prose


def missed_on(sets: list[str]) -> str:
    return f"missed on {' and '.join(sets)}" if sets else "met"


def test_the_speeds_are_the_committed_benchmark():
    results = json.loads((RESULTS / "benchmark" / "cpu.json").read_text())
    readme = (RECIPES / "benchmarks" / "README.md").read_text()
    prose = " ".join(readme.split())
    for name, row in results.items():
        if isinstance(row, dict) and "relative_to_spar" in row:
            share = f"{row['share_of_matmul']:.0%}" if "share_of_matmul" in row else ""
            numbers = f"{row['updates_per_cpu_second']:.1f} | {row['relative_to_spar']:.2f} | {share}"
            assert f"| {name} | {numbers} |" in readme
    assert f"at {results['evaluation']['ratio']:.2f} of bare Gymnasium's steps/s" in prose
    assert f"loaded in {results['load']['load']['seconds']:.1f} s" in prose
    assert f"({results['load_short_episodes']['load']['seconds']:.1f} s as 8,000 episodes)" in prose


def test_the_speeds_beside_jax_and_the_stages_are_the_committed_ones():
    large, small = (
        json.loads((RESULTS / "benchmark" / f"{name}.json").read_text()) for name in ("cpu_avx2", "cpu_avx2_main_job")
    )
    found = {row[0]: row[1:] for table in tables((RECIPES / "benchmarks" / "README.md").read_text()) for row in table}
    for name, row in large.items():
        if isinstance(row, dict) and "relative_to_jax" in row:
            assert found[name] == [
                cell
                for one in (row, small[name])
                for cell in (
                    f"{one['updates_per_cpu_second']:.1f}", f"{one['relative_to_jax']:.2f}",
                    f"{one['share_of_matmul']:.0%}" if "share_of_matmul" in one else "",
                )
            ]  # fmt: skip
    total = sum(large["stages"].values())
    for name, seconds in large["stages"].items():
        if seconds >= 1:
            assert found[name] == [f"{seconds:.0f}", f"{seconds / total:.0%}"]
    prose = " ".join((RECIPES / "benchmarks" / "README.md").read_text().split())
    assert f"The sum is {total:.0f} CPU seconds" in prose
    runs = [*runs_of("six_sets/runs.jsonl"), *(run for run in runs_of("compare/runs.jsonl") if run["method"] != "spar")]
    after, seconds = [], []
    for method, rate in (("spar", "spar_compiled"), ("iql", "torchrl_iql"), ("td3_bc", "torchrl_td3bc")):
        steps = [steps_to_score(run["curve"]) for run in runs if run["method"] == method]
        assert len(steps) == 18
        after.append(f"{np.median(steps):,.0f}")
        seconds.append(np.median(steps) / small[rate]["updates_per_cpu_second"])
    assert f"after {after[0]} updates of SPAR (one member), {after[1]} of IQL" in prose
    assert f"and {after[2]} of TD3+BC" in prose
    first = sum(large["stages"][name] for name in ("anchor", "vae")) + large["stages"]["critics"] / 3
    assert f"{seconds[0]:.0f} CPU seconds of SPAR, compiled, after {first:.0f} for anchor" in prose
    assert f"{seconds[1]:.0f} of IQL and {seconds[2]:.0f} of TD3+BC" in prose


def steps_to_score(curve: dict) -> int:
    """The first evaluation with 90 % of the last one's score."""
    scores = curve["normalized"]
    return next(step for step, score in zip(curve["step"], scores) if score >= 0.9 * scores[-1])


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("embedded Hopper", RECIPES / "data" / "torchrl-spar" / "hopper" / "medium-v0"),
        pytest.param(
            "halfcheetah-medium",
            HALFCHEETAH,
            marks=pytest.mark.skipif(not HALFCHEETAH.exists(), reason="needs ../shared"),
        ),
    ],
)
def test_what_the_guard_catches_is_what_the_readme_says(name, path):
    data = torchrl_spar.load_offline_dataset(path)
    shown = {row[0]: row[1:] for table in tables((RECIPES / "README.md").read_text()) for row in table}
    for quantile in (0.999, 0.99):
        detector = torchrl_spar.fit_detector(data, quantile=quantile)
        shares = shares_of_faults(detector, data[:]["observation"], data.observation_scale)
        for cell, share in zip(shown[f"{name}, {quantile}"], shares.values(), strict=True):
            assert float(cell.rstrip("%")) == pytest.approx(100 * share, abs=1)
    if name.startswith("embedded"):
        detectors = [torchrl_spar.fit_detector(data, seed=seed) for seed in (1, 2)]
        other = [shares_of_faults(one, data[:]["observation"], data.observation_scale) for one in detectors]
        first, second = (f"{100 * shares['one off by 3 std']:.0f}" for shares in other)
        prose = " ".join((RECIPES / "README.md").read_text().split())
        assert f"data's {shown[f'{name}, 0.999'][0].rstrip('%')} % become {first} and {second} %" in prose


def test_the_citation_has_the_version():
    versions = re.findall(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), flags=re.M)
    assert versions == [torchrl_spar.__version__]


def runs_of(file: str) -> list[dict]:
    first, *lines = [json.loads(line) for line in (RESULTS / file).read_text().splitlines()]
    return [first["common"] | line for line in lines]


def test_the_members_are_the_committed_ones():
    (shown,) = [rows for rows in tables((RESULTS / "README.md").read_text()) if "three members" in rows[0]]
    of_one = {(one["dataset"], one["seed"]): one for one in runs_of("six_sets/runs.jsonl") if one["method"] == "spar"}
    found, falls = defaultdict(list), 0
    for three in runs_of("six_sets/members.jsonl"):
        one = of_one[three["dataset"], three["seed"]]
        assert three["members"] == 3
        found[three["dataset"]].append([row["normalized"] for row in (three["anchor"], one["spar"], three["spar"])])
        falls += largest_fall(three) > 15
    expected = []
    for scores in found.values():
        columns = list(zip(*scores))
        cells = [", ".join(f"{score:.1f}" for score in column) for column in columns]
        expected.append([*cells, f"{np.mean(columns[-1]):.1f}"])
    assert sorted(row[1:] for row in shown[2:]) == sorted(expected)
    # What the prose says.
    runs = [run for scores in found.values() for run in scores]
    lead = np.mean([np.mean([three - one for _, one, three in scores]) for scores in found.values()])
    ahead, below = sum(three > one for _, one, three in runs), sum(three < anchor for anchor, _, three in runs)
    assert (len(runs), ahead, below, falls, f"{lead:.1f}") == (18, 13, 0, 4, "1.1")


def largest_fall(run: dict) -> float:
    """Below the best before, in the last half of the curve."""
    curve = run["curve"]["normalized"]
    half = curve[len(curve) // 2 :]
    return max(best - score for best, score in zip(accumulate(half, max), half))


def test_the_long_runs_are_the_committed_ones():
    (shown,) = [rows for rows in tables((RESULTS / "README.md").read_text()) if "after 100,000" in rows[0]]
    short = {(one["dataset"], one["seed"]): one for one in runs_of("six_sets/runs.jsonl") if one["method"] == "spar"}
    expected, below = [], 0
    for one in runs_of("long/runs.jsonl"):
        fall = largest_fall(one)
        numbers = (one["anchor"], short[one["dataset"], one["seed"]]["spar"], one["spar"])
        anchor, _, last = (row["normalized"] for row in numbers)
        expected.append([str(one["seed"]), *(f"{row['normalized']:.1f}" for row in numbers), f"{fall:.1f}"])
        assert one["updates"] == 100_000
        below += last < anchor - 3
    assert [row[1:] for row in shown[2:]] == expected and below == 1
    found = {one["method"]: one.get("spar", one.get("policy"))["normalized"] for one in runs_of("antmaze/runs.jsonl")}
    assert found == {"bc": 0, "iql": 0, "spar": 5}
