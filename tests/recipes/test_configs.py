"""The configurations of true size: built on the meta device, and run on small stand-ins.

``PYTHONPATH=tests python -W ignore tests/recipes/test_configs.py`` writes the memory into their headers and into
docs/configs.md.
"""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import true_sizes
from omegaconf import OmegaConf
from programs import CONFIGS, start, tune
from torchfuse.recipes.finetune_config import Config
from transformers import AutoConfig, AutoModel, LlamaConfig, LlamaForCausalLM

from torchfuse import describe
from torchfuse.checkpoint.published import published_config
from torchfuse.cli.main import main
from torchfuse.training.config import override, read_config, typed
from torchfuse.training.config_files import config_names, summary_of
from torchfuse.training.estimation.estimate import estimate
from torchfuse.training.estimation.gpus import GPUS
from torchfuse.training.estimation.meta_model import model_on_meta

NAMES = [name for name in config_names() if not name.startswith("digits/")]
PAGE = Path(__file__).parents[2] / "docs" / "configs.md"
DEVICES = 8
MEMORY = re.compile(
    r"# Memory \(torchfuse estimate\): ([\d.,]+) GiB on one device \((.+?)\), "
    r"([\d.,]+) GiB on each of 8 \((.+?)\)\."
)
FILLED = 0.85  # of a GPU's memory, so that there is space for fragmentation and for what CUDA needs
# Parameters as their publishers count them, towers without the text half.
PUBLISHED = {
    "Llama-3.1-8B-Instruct": 8.03e9,
    "Llama-3.2-1B-Instruct": 1.24e9,
    "Llama-3.2-11B-Vision-Instruct": 10.7e9,
    "SmolLM2-135M-Instruct": 135e6,
    "clip-vit-large-patch14-336": 304e6,
    "siglip2-base-patch16-224": 93e6,
}


def read(name):
    return read_config(name, "")


def header(name):
    return (CONFIGS / f"{name}.yaml").read_text().partition("\n\n")[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with small checkpoints and data under the names of the true ones."""
    return true_sizes.make_folder(tmp_path_factory.mktemp("true_sizes"))


def finetune(folder, name, *overrides):
    arguments = ["torchfuse/recipes/finetune.py", "--config", name, *true_sizes.shrink(name), *overrides]
    assert f"saved runs/{name}/fusion" in tune(folder, *arguments)
    losses = json.loads((folder / "runs" / name / "losses.json").read_text())
    assert len(losses) == 2
    assert all(0 < loss < 20 for _, loss in losses)


def test_the_configurations_are_all_there():
    archs = [
        f"llama3_2_1b_clip/{arch}" for arch in "cross_attention joint_decoder mot moma deepstack".split()
    ]
    vision = [f"llama3_2_vision_11b/{kind}" for kind in ("fusion", "lora", "qlora")]
    llava = ["llava/stage1", "llava/stage2", "llava/stage2_lora"]
    assert sorted([*archs, *vision, *llava, "smollm2_siglip2/joint_decoder"]) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_it_has_the_published_size_without_any_weight(name):
    model = model_on_meta(OmegaConf.to_container(read(name)), name)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    table = describe(model)
    options = read(name).model
    if "path" in options:
        assert table["total"].parameters == pytest.approx(PUBLISHED[Path(options.path).name], rel=5e-3)
    for part in ("decoder", "encoder"):
        if part in options:
            expected = PUBLISHED[Path(options[part]).name]
            assert table[part].parameters == pytest.approx(expected, rel=5e-3), part


@pytest.mark.parametrize("published", PUBLISHED)
def test_the_published_sizes_are_those_of_transformers(published):
    values = published_config(f"anywhere/{published}")
    with torch.device("meta"):
        config = AutoConfig.for_model(**values)
        model = (
            LlamaForCausalLM(config)
            if isinstance(config, LlamaConfig)
            else AutoModel.from_config(config)
        )
    count = sum(p.numel() for p in model.parameters())
    if values["model_type"] == "mllama":  # AutoModel has no output head
        count += 128_256 * 4096
    assert count == pytest.approx(PUBLISHED[published], rel=5e-3)


@pytest.mark.parametrize("name", NAMES)
def test_its_keys_and_those_of_its_header_are_keys_of_the_recipe(name):
    text = header(name)
    assert "hf download" in text
    commands = re.findall(r"#   tune run (.*)torchfuse/recipes/finetune\.py --config (\S+)(.*)", text)
    assert len(commands) >= 3  # on one device, on several, with overrides
    for _, config, overrides in commands:
        assert config == name
        typed(override(read(name), overrides.split()), Config)
    assert summary_of(name)
    assert read(name).output_dir == f"runs/{name}"


@pytest.mark.parametrize("name", [name for name in NAMES if "stage2" not in name])
def test_it_takes_two_steps(folder, name):
    finetune(folder, name)


@pytest.mark.parametrize("name", [name for name in NAMES if "stage2" in name])
def test_the_second_stage_takes_two_steps_after_the_first(folder, name):
    if not (folder / "runs" / "llava" / "stage1").exists():
        finetune(folder, "llava/stage1")
    finetune(folder, name)


def test_a_name_is_found_by_a_module_and_from_any_folder(tmp_path):
    command = ["-m", "torchfuse.recipes.finetune", "--config", "llava/stage1", "data.train=none.json"]
    done = start(tmp_path, sys.executable, *command)
    assert done.stderr == "error: none.json cannot be read: No such file or directory.\n"


def test_ls_prints_every_name_with_its_summary(capsys):
    assert main(["ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == config_names()
    assert all(len(line.split()) > 4 for line in lines)


def test_cp_copies_to_a_file_or_into_a_folder(tmp_path, capsys):
    assert main(["cp", "llava/stage1", str(tmp_path)]) == 0
    assert main(["cp", "llava/stage2", str(tmp_path / "new" / "mine.yaml")]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path}/stage1.yaml\nwrote {tmp_path}/new/mine.yaml\n"
    original = (CONFIGS / "llava" / "stage2.yaml").read_text()
    assert (tmp_path / "new" / "mine.yaml").read_text() == original


@pytest.mark.parametrize(
    ("name", "destination", "complaint"),
    [
        ("llava/stage1", "mine.yaml", "mine.yaml exists; remove it, or name another file"),
        ("llava/stage3", "new.yaml", "llava/stage3 is neither a file nor the name of .* llava/stage1, "),
        ("llava/stage1", "mine.yaml/new.yaml", r"new.yaml cannot be written \("),
    ],
)
def test_cp_writes_nothing_after_a_mistake(tmp_path, capsys, name, destination, complaint):
    (tmp_path / "mine.yaml").write_text("mine")
    assert main(["cp", name, str(tmp_path / destination)]) == 1
    assert re.search(complaint, capsys.readouterr().err)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.yaml"]
    assert (tmp_path / "mine.yaml").read_text() == "mine"


def memory(name):
    """GiB on one device, and on each of several."""
    result = estimate(name)
    return tuple(result.on(devices).peak / 2**30 for devices in (1, DEVICES))


def smallest_gpu(size):
    """The GPU with the least memory that has space for this many GiB."""
    fitting = [(gpu.memory, name) for name, gpu in GPUS.items() if size * 2**30 < FILLED * gpu.memory]
    return f"{min(fitting)[1]} or larger" if fitting else "more than one GPU has"


def memory_line(one, several):
    return (
        f"# Memory (torchfuse estimate): {one:.1f} GiB on one device ({smallest_gpu(one)}), "
        f"{several:.1f} GiB on each of {DEVICES} ({smallest_gpu(several)})."
    )


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_the_memory_in_its_header_is_the_estimate(name):
    one, _, several, _ = MEMORY.search(header(name)).groups()
    assert (float(one), float(several)) == pytest.approx(memory(name), rel=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_it_fits_the_gpu_of_its_header(name):
    one, of_one, several, of_several = MEMORY.search(header(name)).groups()
    assert memory_line(float(one), float(several)) in header(name)
    # One device is enough for all but one, of which the header says so.
    assert of_one.removesuffix(" or larger") in GPUS or name == "llava/stage2"
    assert of_several.removesuffix(" or larger") in GPUS


def page_table():
    rows = ["| configuration | | GiB on one device | on each of 8 |", "|---|---|---|---|"]
    for name in NAMES:
        one, _, several, _ = MEMORY.search(header(name)).groups()
        rows.append(f"| `{name}` | {summary_of(name)} | {one} | {several} |")
    return "\n".join(rows)


def test_the_page_has_the_memory_of_the_headers():
    assert page_table() in PAGE.read_text()


if __name__ == "__main__":
    for name in NAMES:
        file = CONFIGS / f"{name}.yaml"
        line = memory_line(*memory(name))
        file.write_text(re.sub(r"^# Memory.*$", line, file.read_text(), flags=re.MULTILINE))
        print(name, line)
    text = PAGE.read_text()
    PAGE.write_text(
        re.sub(r"\| configuration \|.*?\n(?!\|)", page_table() + "\n", text, flags=re.DOTALL)
    )
