"""Tables and LeRobot's layout, written here, against the arrays that they were written from."""

from __future__ import annotations

import io
import json
import sys

import numpy as np
import pytest
import torch
from torchrl.data import Bounded

from torchrl_spar import InputError, load_offline_dataset

arrow = pytest.importorskip("pyarrow")
csv, feather, parquet = (pytest.importorskip(f"pyarrow.{name}") for name in ("csv", "feather", "parquet"))

LENGTHS = (4, 3, 5)
N = sum(LENGTHS)
EPISODE = np.repeat(np.arange(3), LENGTHS)
FRAME = np.concatenate([np.arange(length) for length in LENGTHS])
LAST = np.append(EPISODE[1:] != EPISODE[:-1], True)
RNG = np.random.default_rng(0)
STATE = RNG.normal(size=(N, 2)).astype(np.float32)
ACTION = RNG.uniform(-1, 1, size=(N, 2)).astype(np.float32)
REWARD = RNG.normal(size=N)
RETURNS = np.bincount(EPISODE, REWARD)
COLUMNS = {"observation": ["x", "v"], "action": ["u", "w"], "reward": "r", "terminated": "end", "episode": "id"}
TABLE = arrow.table(
    {"x": STATE[:, 0], "v": STATE[:, 1], "u": ACTION[:, 0], "w": ACTION[:, 1], "r": REWARD, "end": LAST, "id": EPISODE}
)


def write_stream(table, path):
    with arrow.ipc.new_stream(path, table.schema) as stream:
        stream.write_table(table)


WRITERS = {
    ".parquet": parquet.write_table, ".csv": csv.write_csv, ".feather": feather.write_feather, ".arrow": write_stream
}  # fmt: skip


@pytest.mark.parametrize("suffix", WRITERS)
def test_tables_hold_their_rows(tmp_path, suffix):
    path = tmp_path / f"log{suffix}"
    WRITERS[suffix](TABLE, path)
    buffer = load_offline_dataset(path, columns=COLUMNS)
    rows = buffer[:]
    np.testing.assert_allclose(rows["observation"], STATE, rtol=1e-6)
    np.testing.assert_allclose(rows["action"], ACTION, rtol=1e-6)
    assert rows["episode"].tolist() == EPISODE.tolist()
    assert rows["next", "terminated"][:, 0].tolist() == LAST.tolist()
    inside = torch.from_numpy(~LAST).nonzero()[:, 0]
    assert torch.equal(rows["next", "observation"][inside], rows["observation"][inside + 1])
    np.testing.assert_allclose(buffer.episode_returns, RETURNS)


@pytest.mark.parametrize("step", [FRAME, np.datetime64("2024-05-01T12:00", "us") + FRAME, FRAME - 7.5])
@pytest.mark.parametrize("category", [False, True])
def test_rows_in_any_order_with_text_ids_steps_and_lists(tmp_path, step, category):
    order = RNG.permutation(N)
    names = arrow.array([f"run-{'cab'[episode]}" for episode in EPISODE])
    names = names.dictionary_encode() if category else names
    table = arrow.table(
        {"obs": list(STATE), "u": list(ACTION), "r": REWARD, "id": names, "t": step}
    ).take(order)  # fmt: skip
    path = tmp_path / "LOG.PARQUET"  # as other systems write it
    parquet.write_table(table, path)
    columns = {"observation": "obs", "action": "u", "reward": "r", "episode": "id", "step": "t"}
    buffer = load_offline_dataset(path, columns=columns)
    np.testing.assert_allclose(sorted(buffer.episode_returns), sorted(RETURNS))
    rows = buffer[:]  # the last row of each has no next observation
    assert len(rows) == N - 3
    for row in rows:
        index = int((torch.from_numpy(STATE) == row["observation"]).all(-1).nonzero())
        assert torch.equal(row["next", "observation"], torch.from_numpy(STATE[index + 1]))


@pytest.mark.parametrize(
    "columns, message",
    [
        (None, r"a table needs columns="),
        ({**COLUMNS, "observation": ["x", "y"]}, r"no array 'y'; there are: x, v"),
        ({**COLUMNS, "observations": ["x"]}, r"columns: 'observations' is none of"),
        ({key: x for key, x in COLUMNS.items() if key != "reward"}, r"columns: 'reward' must be named"),
        ({key: x for key, x in COLUMNS.items() if key not in ("terminated", "episode")}, r"tell episodes apart"),
        ({**COLUMNS, "action": "id"}, r"id: type int64; SPAR needs continuous"),
        ({**COLUMNS, "observation": "hole"}, r"hole: 1 values are missing, the first in row 2"),
        ({**COLUMNS, "observation": "ragged"}, r"ragged: lists of 1 to 2 numbers"),
        ({**COLUMNS, "observation": "holes"}, r"holes: 1 numbers within its lists are missing"),
        ({**COLUMNS, "observation": ["x", "name"]}, r"name: type string, such as .* in row 0, expected numbers"),
        ({**COLUMNS, "observation": "empty"}, r"empty: empty lists"),
        ({**COLUMNS, "truncated": None}, r"columns: 'truncated' is None, expected"),
    ],
)
def test_bad_columns_are_named(tmp_path, columns, message):
    hole = arrow.array([None if i == 2 else 1.0 for i in range(N)])
    ragged = arrow.array([[1.0] * (1 + (i > 3)) for i in range(N)])
    holes = arrow.array([[1.0, None if i == 2 else 1.0] for i in range(N)])
    name = arrow.array(["robot"] * N)
    table = TABLE.append_column("hole", hole).append_column("ragged", ragged)
    table = table.append_column("holes", holes).append_column("name", name)
    table = table.append_column("empty", arrow.array([[]] * N, arrow.list_(arrow.float32())))
    parquet.write_table(table, tmp_path / "log.parquet")
    with pytest.raises(InputError, match=message):
        load_offline_dataset(tmp_path / "log.parquet", columns=columns)


def test_a_column_that_is_there_twice_is_named(tmp_path):
    names = ",".join(COLUMNS[field] if isinstance(COLUMNS[field], str) else COLUMNS[field][0] for field in COLUMNS)
    (tmp_path / "log.csv").write_text(f"{names},{names}\n" + "0.5,0.5,0.5,0,0,0.5,0.5,0.5,0,0\n")
    with pytest.raises(InputError, match=r"holds the column 'x' 2 times: keep one"):
        load_offline_dataset(tmp_path / "log.csv", columns=COLUMNS)


def test_columns_are_of_tables_alone(tmp_path):
    np.savez(tmp_path / "toy.npz", observations=STATE)
    with pytest.raises(InputError, match="columns: only of tables"):
        load_offline_dataset(tmp_path / "toy.npz", columns=COLUMNS)


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    parquet.write_table(TABLE, tmp_path / "log.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"needs pyarrow: pip install 'torchrl-spar\[tables\]'"):
        load_offline_dataset(tmp_path / "log.parquet", columns=COLUMNS)


# --- LeRobot ------------------------------------------------------------------------------------


def write_lerobot(root, version="v3.0", images=None, state=True, **more):
    """LeRobot's layout: v3 has several episodes in a file, v2.1 one; images: image (in the table) or video."""
    columns = {"action": list(ACTION), "timestamp": FRAME / 10, "frame_index": FRAME, "episode_index": EPISODE}
    columns |= {"index": np.arange(N), "task_index": np.zeros(N, int), **more}
    if state:
        columns["observation.state"] = list(STATE)
    if images == "image":
        columns[CAMERA] = [{"bytes": png(frame), "path": None} for frame in FRAMES]
    features = {name: {"dtype": "float32", "shape": [1]} for name in columns}
    if images:
        features[CAMERA] = {"dtype": images, "shape": [3, 4, 3]}
    (root / "meta").mkdir(parents=True)
    info = {"codebase_version": version, "features": features, "fps": 10, "total_episodes": 3, "total_frames": N}
    (root / "meta" / "info.json").write_text(json.dumps(info))
    (root / "data" / "chunk-000").mkdir(parents=True)
    table = arrow.table(columns)
    parts = [(f"file-{i:03d}", rows) for i, rows in enumerate((EPISODE < 2, EPISODE == 2))]
    if version < "v3":
        parts = [(f"episode_{i:06d}", i == EPISODE) for i in range(3)]
    for name, rows in parts:
        parquet.write_table(table.filter(arrow.array(rows)), root / "data" / "chunk-000" / f"{name}.parquet")
    return root


def png(frame):
    """Losslessly encoded."""
    file = io.BytesIO()
    pytest.importorskip("PIL.Image").fromarray(frame).save(file, format="PNG")
    return file.getvalue()


def brightness(images):
    assert images.dtype == torch.uint8 and images.shape[1:] == (3, 3, 4)
    return images.float().mean((2, 3)) / 255


CAMERA = "observation.images.top"
FRAMES = RNG.integers(0, 256, size=(N, 3, 4, 3), dtype=np.uint8)
ENDS = {"next.reward": REWARD, "next.done": LAST}


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_a_lerobot_set_holds_its_rows(tmp_path, version):
    write_lerobot(tmp_path / "me" / "set", version, **ENDS)
    for source, root in ((f"lerobot:{tmp_path / 'me' / 'set'}", None), ("lerobot:me/set", tmp_path)):
        buffer = load_offline_dataset(source, root=root)
        rows = buffer[:]
        np.testing.assert_array_equal(rows["observation"], STATE)
        np.testing.assert_array_equal(rows["action"], ACTION)
        np.testing.assert_allclose(rows["next", "reward"][:, 0], REWARD, rtol=1e-6)
        assert rows["next", "terminated"][:, 0].tolist() == LAST.tolist()
        assert rows["episode"].tolist() == EPISODE.tolist()
        np.testing.assert_allclose(buffer.episode_returns, RETURNS)


def test_an_end_without_success_is_a_time_limit(tmp_path):
    write_lerobot(tmp_path / "set", **ENDS, **{"next.success": LAST & (EPISODE == 1)})
    buffer = load_offline_dataset(f"lerobot:{tmp_path / 'set'}")
    rows = buffer[:]
    assert len(rows) == N - 2 and rows["episode"][rows["next", "terminated"][:, 0]].tolist() == [1]
    np.testing.assert_allclose(buffer.episode_returns, RETURNS)


def test_a_success_at_the_end_is_one_without_done_flags(tmp_path):
    """Success on the way, which the robot leaves again, ends nothing; a user's own column for ends counts first."""
    success = (LAST | (FRAME == 0)) & (EPISODE == 1)
    write_lerobot(tmp_path / "set", **{"next.reward": REWARD, "next.success": success})
    buffer = load_offline_dataset(f"lerobot:{tmp_path / 'set'}")
    rows = buffer[:]
    assert len(rows) == N - 2 and rows["next", "terminated"].sum() == 1
    assert rows["episode"][rows["next", "terminated"][:, 0]].tolist() == [1]
    np.testing.assert_allclose(buffer.episode_returns, RETURNS)
    own = load_offline_dataset(f"lerobot:{tmp_path / 'set'}", columns={"terminated": "next.success"})
    assert own[:]["next", "terminated"].sum() == 2


def test_demonstrations_without_rewards_are_told_of_success(tmp_path):
    write_lerobot(tmp_path / "set", **{"next.success": LAST & (EPISODE == 1)})
    with pytest.warns(UserWarning, match=r"columns={'reward': 'next.success'} rewards success"):
        load_offline_dataset(f"lerobot:{tmp_path / 'set'}")
    buffer = load_offline_dataset(f"lerobot:{tmp_path / 'set'}", columns={"reward": "next.success"})
    assert buffer.episode_returns.tolist() == [0, 1, 0]


def test_demonstrations_without_rewards_warn(tmp_path):
    write_lerobot(tmp_path / "set", images="video")
    with pytest.warns(UserWarning) as caught:
        buffer = load_offline_dataset(f"lerobot:{tmp_path / 'set'}")
    messages = " ".join(str(warning.message) for warning in caught)
    assert "all rewards are 0" in messages and "observation.images.top" in messages
    assert not buffer[:]["next", "reward"].any() and len(buffer) == N - 3


@pytest.mark.parametrize("images, remedy", [("image", "encoder=... makes"), ("video", "encode the frames yourself")])
def test_images_alone_are_refused_with_the_reason(tmp_path, images, remedy):
    write_lerobot(tmp_path / "set", images=images, state=False, **ENDS)
    with pytest.raises(InputError, match=rf"observations are images \({CAMERA}\).*{remedy}"):
        load_offline_dataset(f"lerobot:{tmp_path / 'set'}")


@pytest.mark.parametrize("state", [True, False])
def test_an_encoder_makes_features_of_images(tmp_path, state):
    source = f"lerobot:{write_lerobot(tmp_path / 'set', images='image', state=state, **ENDS)}"
    for encoder in (brightness, lambda images: 1 - brightness(images)):
        buffer = load_offline_dataset(source, encoder=encoder)
        features = encoder(torch.from_numpy(FRAMES).permute(0, 3, 1, 2))
        expected = torch.cat([torch.from_numpy(STATE), features], 1) if state else features
        torch.testing.assert_close(buffer[:]["observation"], expected)
        np.testing.assert_allclose(buffer.episode_returns, RETURNS)


def test_what_an_encoder_cannot_do_is_named(tmp_path):
    encoded = f"lerobot:{write_lerobot(tmp_path / 'images', images='image', **ENDS)}"
    for encoder, message in ((torch.Tensor.float, r"gives \(12, 3, 3, 4\) of 12"), (len, "gives int of 12 images")):
        with pytest.raises(InputError, match=message):
            load_offline_dataset(encoded, encoder=encoder)
    for source, message in (
        (f"lerobot:{write_lerobot(tmp_path / 'videos', images='video', **ENDS)}", "videos .*not decoded"),
        (f"lerobot:{write_lerobot(tmp_path / 'state', **ENDS)}", "it has no images"),
        (tmp_path / "log.parquet", "encoder: only of the images of LeRobot sets"),
    ):
        with pytest.raises(InputError, match=message):
            load_offline_dataset(source, encoder=brightness, columns=None)


def test_physical_units_are_bounded_by_the_data_with_a_warning(tmp_path):
    write_lerobot(tmp_path / "set", **ENDS, action=list(100 * ACTION))
    with pytest.warns(UserWarning, match="least and largest values are their bounds"):
        spec = load_offline_dataset(f"lerobot:{tmp_path / 'set'}").action_spec
    np.testing.assert_allclose(spec.space.high, 100 * ACTION.max(0), rtol=1e-6)
    given = load_offline_dataset(f"lerobot:{tmp_path / 'set'}", action_spec=Bounded(-100, 100, (2,)))
    assert given.action_spec.space.high.tolist() == [100, 100]


def test_missing_and_other_directories(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(InputError, match=r"lerobot:no/set: not found .*no network"):
        load_offline_dataset("lerobot:no/set", root=tmp_path)
    with pytest.raises(InputError, match=r"no LeRobot data set: it holds no meta/info\.json"):
        load_offline_dataset(f"lerobot:{tmp_path}")
    with pytest.raises(InputError, match=r"layout v1.6: convert it"):
        load_offline_dataset(f"lerobot:{write_lerobot(tmp_path / 'old', 'v1.6', **ENDS)}")
