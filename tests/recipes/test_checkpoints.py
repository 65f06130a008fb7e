"""Checkpoints that were damaged, forged or could not be written: the good state, or one named error."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import tempfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import checkpoints
from harness.checkpoints import CHECKSUMS, Checkpoints, sha256
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_spar import InputError, load_offline_dataset, load_policy

OPTIONS = {"0": {"seed": 0}}


class Learner:
    """A network and its optimiser; after n steps the bias is n."""

    def __init__(self):
        self.net = torch.nn.Linear(40, 1)
        self.optimizer = torch.optim.Adam(self.net.parameters())

    def learn(self, n):
        self.net(torch.ones(40)).backward()
        self.optimizer.step()
        self.net.bias.data.fill_(n)
        self.net.weight.data.fill_(n)

    def state_dict(self):
        return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict(), "name": "learner"}

    def load_state_dict(self, state):
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])

    @property
    def step(self):
        (step,) = {*self.net.weight.flatten().tolist(), *self.net.bias.tolist()}
        return step


def save_three(home):
    """Three checkpoints, of which two are kept: of the steps 2 and 3."""
    saver, learner = Checkpoints(home, 0, OPTIONS), Learner()
    saver.add("learner", learner)
    for step in (1, 2, 3):
        learner.learn(step)
        saver.step()
    return learner


def restored_step(home):
    """Of the checkpoint that is used; a state that none of them has fails."""
    learner = Learner()
    saver = Checkpoints(home, 0, OPTIONS)
    assert saver.knows("learner")
    saver.add("learner", learner)
    assert {float(state["step"]) for state in learner.optimizer.state.values()} == {learner.step}
    return learner.step


def files_of(home):
    return sorted(path for path in home.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    home = tmp_path_factory.mktemp("template")
    save_three(home)
    assert sorted(path.name for path in (home / "checkpoints").iterdir()) == [
        "checkpoint-000000000002",
        "checkpoint-000000000003",
    ]
    assert restored_step(home) == 3
    return home


def in_newest(path):
    return "checkpoint-000000000003" in path.parts


def flip(path, where, other):
    content = bytearray(path.read_bytes())
    if content:
        content[where % len(content)] ^= 1 << where % 8
        path.write_bytes(content)


def cut(path, where, other):
    os.truncate(path, where % (path.stat().st_size + 1))


def remove(path, where, other):
    path.unlink()


def garble(path, where, other):
    path.write_bytes(np.random.default_rng(where).bytes(where % 4096))


def swap(path, where, other):
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)


def replace(path, where, other):
    path.write_bytes(other.read_bytes())


def add_foreign(path, where, other):
    (path.parent / ("state.pt", "other.pickle", "state.tdc", "x")[where % 4]).write_bytes(other.read_bytes())


MUTATIONS = (flip, cut, remove, garble, swap, replace, add_foreign)
mutation = st.tuples(st.sampled_from(MUTATIONS), st.integers(0, 2**20), st.integers(0, 7), st.integers(0, 7))


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(st.lists(mutation, min_size=1, max_size=3), st.booleans())
def test_whatever_is_done_to_its_files_a_checkpoint_is_right_or_refused(template, mutations, newest_alone):
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        home = Path(scratch) / "home"
        shutil.copytree(template, home)
        for mutate, where, first, second in mutations:
            files = [path for path in files_of(home) if in_newest(path) or not newest_alone]
            mutate(files[first % len(files)], where, files[second % len(files)])
        try:
            found = restored_step(home)
        except InputError as err:
            assert not newest_alone and str(home) in str(err)
            return
        assert found in (2, 3)
        if newest_alone and found == 2:
            assert any("checkpoint-000000000003: damaged" in str(warning.message) for warning in caught)


def test_without_a_good_checkpoint_there_is_one_named_error(template, tmp_path):
    home = shutil.copytree(template, tmp_path / "home")
    for path in files_of(home):
        if path.name == "state.tdz":
            flip(path, 1000, None)
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(InputError, match=f"{home}/checkpoints: no check"):
        Checkpoints(home, 0, OPTIONS)


def test_a_damaged_checkpoint_is_overwritten_by_the_next(template, tmp_path):
    home = shutil.copytree(template, tmp_path / "home")
    shutil.rmtree(home / "checkpoints" / "checkpoint-000000000003" / "components")
    with pytest.warns(UserWarning, match="000003: damaged"):
        saver = Checkpoints(home, 0, OPTIONS)
    learner = saver.add("learner", Learner())
    learner.learn(3)
    saver.save()
    assert restored_step(home) == 3
    assert len(list((home / "checkpoints").iterdir())) == 2


def test_a_checkpoint_of_another_run_is_refused(template, tmp_path):
    home = shutil.copytree(template, tmp_path / "home")
    with pytest.warns(UserWarning, match="of another run"), pytest.raises(InputError, match="no checkpoint"):
        Checkpoints(home, 0, {"0": {"seed": 1}})


def test_a_state_that_does_not_fit_is_named(template):
    saver = Checkpoints(template, 0, OPTIONS)
    with pytest.raises(InputError, match="000003: learner does not fit this version of the code"):
        saver.add("learner", torch.nn.Linear(3, 2))


class Bomb:
    """Code in a pickle: makes a directory."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_the_bomb_works(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "boom")))
    assert (tmp_path / "boom").is_dir()


def forge(component, names):
    """Checksums as if these were the files."""
    sums = {name: sha256(component / name) for name in names}
    (component / CHECKSUMS).write_text(json.dumps(sums))


@pytest.mark.parametrize("where", ["state.pt", "state", "member", "non-tensor"])
def test_a_hostile_checkpoint_executes_nothing(template, tmp_path, where):
    home, boom = shutil.copytree(template, tmp_path / "home"), tmp_path / "boom"
    bomb = pickle.dumps({"data": Bomb(boom)})
    for component in home.glob("checkpoints/*/components/*"):
        names = ["state.tdz", "state.json"]
        if where == "state.pt":
            torch.save(Bomb(boom), component / "state.pt")
            names = ["state.pt", "state.json", "state.tdz"]
        elif where == "state":
            (component / "state").mkdir()
            (component / "state" / "other.pickle").write_bytes(bomb)
            (component / "state" / "meta.json").write_text('{"_type": "NonTensorData"}')
        else:
            kind = "<class 'tensordict.tensorclass.NonTensorData'>"
            with zipfile.ZipFile(component / "state.tdz", "a" if where == "member" else "w") as archive:
                archive.writestr("other.pickle", bomb)
                if where == "non-tensor":
                    archive.writestr("meta.json", json.dumps({"_type": kind, "_is_non_tensor": True, "batch_size": []}))
        forge(component, names)
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(InputError):
        Checkpoints(home, 0, OPTIONS)
    assert not boom.exists()


def test_hostile_policies_and_data_execute_nothing(tmp_path):
    boom = tmp_path / "boom"
    (tmp_path / "policy.pt").write_bytes(pickle.dumps(Bomb(boom)))
    with pytest.raises(InputError, match=r"policy\.pt"):
        load_policy(tmp_path / "policy.pt")
    torch.save({"format": "torchrl_spar.evaluation.policy_file.1", "state_dict": Bomb(boom)}, tmp_path / "policy.pt")
    with pytest.raises(InputError, match=r"policy\.pt"):
        load_policy(tmp_path / "policy.pt")
    names = ("observations", "actions", "rewards", "terminals")
    np.savez(tmp_path / "data.npz", **{name: np.array([Bomb(boom)], dtype=object) for name in names})
    (tmp_path / "data.hdf5").write_bytes(pickle.dumps(Bomb(boom)))
    for name in ("data.npz", "data.hdf5"):
        with pytest.raises(InputError, match=name):
            load_offline_dataset(tmp_path / name)
    assert not boom.exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.ESTALE])
@pytest.mark.parametrize("name", ["state.json", "sha256.json", "manifest.json"])
def test_a_write_that_fails_is_named_and_harms_nothing(tmp_path, monkeypatch, code, name):
    home = tmp_path / "home"
    learner = save_three(home)
    saver = Checkpoints(home, 0, OPTIONS)
    saver.add("learner", learner)
    learner.learn(4)
    before = {path: path.read_bytes() for path in files_of(home)}

    def failing(path, *args, real=Path.open, **kwargs):
        if path.name == name and "w" in args:
            raise OSError(code, os.strerror(code))
        return real(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", failing)
        patch.setattr(Path, "write_text", lambda path, text: failing(path, "w").write(text))
        with pytest.raises(InputError, match=rf"{home}/checkpoints: .*000003: {os.strerror(code)}"):
            saver.save()
    assert {path: path.read_bytes() for path in files_of(home)} == before
    assert restored_step(home) == 3


def test_a_directory_that_is_gone_is_named_and_not_made_anew(tmp_path):
    home = tmp_path / "home"
    saver = Checkpoints(home, 0, OPTIONS)
    saver.add("learner", Learner())
    saver.save()
    shutil.rmtree(home)
    with pytest.raises(InputError, match="the directory is gone"):
        saver.save()
    assert not home.exists()


@pytest.fixture
def small_disk(tmp_path):
    """A megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    # Mounting takes root's rights. Without them a full disk is still tested above, by injected errors.
    done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "-o", "size=1m", str(disk)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_full(small_disk):
    learner = save_three(small_disk)
    saver = Checkpoints(small_disk, 0, OPTIONS)
    saver.add("learner", learner)
    learner.learn(4)
    for left in (0, 1_000, 4_096, 8_192, 16_384):
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        (small_disk / "other").write_bytes(bytes(free - left))
        try:
            saver.save()
        except InputError as err:
            assert "No space left" in str(err)
            assert restored_step(small_disk) == 3
        else:
            assert left == 16_384
        (small_disk / "other").unlink()
    saver.save()
    assert restored_step(small_disk) == 4


def test_what_a_killed_write_left_is_removed(template, tmp_path):
    home = shutil.copytree(template, tmp_path / "home")
    directory = home / checkpoints.NAME
    shutil.copytree(directory / "checkpoint-000000000003", directory / ".checkpoint-000000000004.stage-0")
    assert restored_step(home) == 3
    assert len(list(directory.iterdir())) == 2
