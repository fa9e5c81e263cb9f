"""The commands of docs/adapters.md print what it shows."""

import json
import re
import shlex
import zipfile
from pathlib import Path

import peft
import pytest

from rayfin.cli import main
from rayfin.config.schema import ModelConfig
from rayfin.models import load_base


def test_the_guide_s_commands_print_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """… stands for what differs, or for more."""
    guide = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```console\n(.*?)```", guide, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(load_base(ModelConfig(name="tiny"), None, "cpu"), settings)
    model.peft_config["default"].base_model_name_or_path = "tiny"
    model.save_pretrained("strangers", save_embedding_layers=False)
    Path("strangers/README.md").unlink()
    with zipfile.ZipFile("lora.zip", "w") as archive:
        for file in sorted(Path("strangers").iterdir()):
            archive.write(file)
    config = Path("strangers/adapter_config.json")
    named = json.loads(config.read_text()) | {"base_model_name_or_path": "/data/models/tiny/"}
    config.write_text(json.dumps(named))
    for step in block.split("$ ")[1:]:
        command, shown = step.split("\n", 1)
        code = main(shlex.split(command)[1:])
        told = capsys.readouterr()
        pattern = re.escape(shown.strip()).replace("…", r"(?:.|\n)*")
        assert re.fullmatch(pattern, (told.out + told.err).strip()), (pattern, told)
        assert code == (2 if "rayfin: " in shown else 0)
