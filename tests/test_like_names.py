"""Names that are nearly those of methods, commands and presets."""

import pytest
from helpers import one_line


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fedrouter+", "; fedrouter+ is --strategy fedrouter --turns staggered; choose among fedrouter, fedit"),
        ("oracle+", "; oracle+ is --strategy oracle --turns staggered; "),
        ("fedit+", "; there is fedit; "),
        ("FedIT", "; there is fedit; "),
        ("FedRouter", "; there is fedrouter; "),
        ("FFA-LoRA", "; there is ffalora; "),
        ("FedSA-LoRA", "; there is fedsa; "),
        ("FedDPA", "; there is feddpa-t and feddpa-f; "),
        ("fedalign", "; there is fedalt"),
        ("fedavg", "; fedavg is --strategy fedit; "),
        ("FedProx", "; fedprox is --strategy fedit --proximal 0.1; "),
        ("fedadam", "; fedadam is --strategy fedit --server adam --server-rate 0.01; "),
        ("qqq", "; choose among fedrouter, fedit"),
    ],
)
def test_strategies_of_a_like_name_are_told(name, said, capsys):
    assert f"--strategy {name!r} is unknown{said}" in one_line(capsys, "run", "--strategy", name)


def test_commands_of_a_like_name_are_told(capsys):
    assert "no command 'reprot'; there is report; choose among run, resume" in one_line(capsys, "reprot")
    assert "'smok' is unknown; there is smoke; choose among smoke" in one_line(capsys, "run", "--preset", "smok")
