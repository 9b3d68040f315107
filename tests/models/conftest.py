"""A folder of a small Llama, and a copy to break."""

import shutil

import pytest
from torch_models import torch_model

from fedrouter_jax import models


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A saved Llama folder; tests that break it copy it first."""
    folder = tmp_path_factory.mktemp("llama")
    torch_model("Llama", {"tie_word_embeddings": True}, folder)
    models.tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def broken(llama, tmp_path):
    return shutil.copytree(llama, tmp_path / "broken")
