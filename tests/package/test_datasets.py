"""Our Minari reader behind TorchRL's load_dataset, against the file it reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torchrl.data import SliceSampler
from torchrl.data.datasets import load_dataset

import torchrl_spar.data.registry  # noqa: F401 - registers
from torchrl_spar import InputError, OfflineReplayBuffer

pytest.importorskip("minari")
h5py = pytest.importorskip("h5py")

ROOT = Path(__file__).resolve().parents[2] / "recipes" / "data"
ID = "torchrl-spar/hopper/medium-v0"


def test_load_dataset_returns_the_rows_of_the_file():
    data = load_dataset(f"minari-exact:{ID}", root=ROOT, batch_size=7)
    assert isinstance(data, OfflineReplayBuffer) and data.sample().shape == (7,)
    with h5py.File(ROOT / ID / "data" / "main_data.hdf5") as file:
        episodes = [file[f"episode_{index}"] for index in range(len(file))]
        actions = np.concatenate([episode["actions"][()] for episode in episodes])
        following = np.concatenate([episode["observations"][1:] for episode in episodes])
    assert torch.equal(data[:]["action"], torch.from_numpy(actions).float())
    assert torch.equal(data[:]["next", "observation"], torch.from_numpy(following).float())


def test_torchrls_options_of_a_buffer_pass_through():
    sampler = SliceSampler(slice_len=5, traj_key="episode")
    batch = load_dataset(f"minari-exact:{ID}", root=ROOT, batch_size=10, sampler=sampler).sample().view(2, 5)
    assert (batch["episode"] == batch["episode"][:, :1]).all()
    assert torch.equal(batch["next", "observation"][:, :-1], batch["observation"][:, 1:])


def test_a_missing_set_names_itself(monkeypatch, tmp_path):
    import minari

    def offline(dataset_id):
        raise OSError("no network")

    monkeypatch.setattr(minari, "download_dataset", offline)
    with pytest.raises(InputError, match="minari:no/such-v0: not found under"):
        load_dataset("minari-exact:no/such-v0", root=tmp_path)
