"""Files and checkpoints: whole or as they were."""

import shutil

import jax.numpy as jnp
import pytest

from fedrouter_jax import checkpoint, files
from fedrouter_jax.errors import UserError


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file"
    files.write(path, "old")
    with pytest.raises(KeyboardInterrupt), files.replaced(path) as beside:
        beside.write_text("ne")
        assert path.read_text() == "old"
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_line_ends_where_its_own_break_is(tmp_path):
    """JSON of any script holds U+2028 and U+0085 as they are, which are no ends of lines in a file."""
    log = tmp_path / "log"
    log.write_text('"one \u2028 \x85 whole"\n"two"\n"cut sh', encoding="utf-8")
    assert files.lines(log) == ['"one \u2028 \x85 whole"', '"two"']


def test_a_checkpoint_that_cannot_be_written_is_one_line_whatever_is_raised(tmp_path, monkeypatch):
    def full(*_):
        raise ValueError("RESOURCE_EXHAUSTED: \n no space left")  # TensorStore's kind of error

    monkeypatch.setattr(checkpoint, "_open", full)
    with pytest.raises(UserError, match="the checkpoint of round 2 could not be written .*: no space left"):
        checkpoint.save(tmp_path, 2, {"x": jnp.zeros(2)})


def test_numbers_that_changed_in_a_checkpoint_are_noticed(tmp_path, monkeypatch):
    state = {"x": jnp.arange(6.0), "y": jnp.ones(3, jnp.bfloat16)}
    other = checkpoint._crc32({**state, "x": state["x"].at[2].set(7)})
    assert other != checkpoint._crc32(state) == checkpoint._crc32(dict(state))
    checkpoint.save(tmp_path, 0, state)
    assert checkpoint.load(tmp_path, 0, state)["x"].tolist() == [0, 1, 2, 3, 4, 5]
    monkeypatch.setattr(checkpoint, "_crc32", lambda state: other)  # as of an array that is read otherwise
    with pytest.raises(UserError, match="its numbers are not those that were written.*move folder 0 away"):
        checkpoint.load(tmp_path, 0, state)
    monkeypatch.setattr(checkpoint, "_crc32", lambda state: None)  # of a process that holds only a part
    assert checkpoint.load(tmp_path, 0, state)["y"].tolist() == [1, 1, 1]


def test_what_another_process_has_written_is_waited_for(tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr(files.clock, "sleep", lambda _: waited.append(1) or len(waited) < 3 or (tmp_path / "x").touch())
    files.appear(tmp_path / "x")
    assert len(waited) == 3
    files.appear(tmp_path / "never", seconds=5)  # missed where it is read
    assert len(waited) == 8


def test_a_checkpoint_that_is_removed_while_it_is_read_gives_way_to_the_next(tmp_path, monkeypatch):
    """As of a run that trains on."""
    load = checkpoint.load
    for step in (0, 1):
        checkpoint.save(tmp_path, step, {"x": jnp.full(2, step)})

    def late(folder, step, like):
        if step == 1:
            checkpoint.save(tmp_path, 2, {"x": jnp.full(2, 2)})
            shutil.rmtree(tmp_path / "1")
        return load(folder, step, like)

    monkeypatch.setattr(checkpoint, "load", late)
    assert checkpoint.load_latest(tmp_path, {"x": jnp.zeros(2, jnp.int32)})["x"].tolist() == [2, 2]
    with pytest.raises(UserError, match="round 2 could not be read"):  # what stays damaged is told
        checkpoint.load_latest(tmp_path, {"x": jnp.zeros(3, jnp.int32)})


def test_asking_for_checkpoints_makes_no_folder(tmp_path):
    assert checkpoint.latest(tmp_path / "checkpoints") is None and not list(tmp_path.iterdir())


def test_the_two_latest_checkpoints_are_kept(tmp_path):
    for step in range(4):
        checkpoint.save(tmp_path, step, {"x": jnp.full(2, step)})
    assert checkpoint.latest(tmp_path) == 3
    for step in (2, 3):
        found = checkpoint.load(tmp_path, step, {"x": jnp.zeros(2, jnp.int32)})["x"]
        assert found.tolist() == [step] * 2
        assert not found.committed  # as what is made, or a resumed run would compile all anew
    with pytest.raises(UserError, match="round 1 could not be read"):
        checkpoint.load(tmp_path, 1, {"x": jnp.zeros(2, jnp.int32)})
