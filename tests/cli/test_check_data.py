import pytest
import yaml
from sample_records import CAT, llava, write_array, write_images, write_lines

from torchfuse.cli.main import main


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path)
    write_lines(tmp_path / "good.jsonl", [llava("<image>which ?", "a cat", image=CAT)] * 3)
    write_array(tmp_path / "bad.json", [llava("Q", "A"), llava("<image>Q", "A")])
    return tmp_path


def config(folder, **data):
    transform = {"_component_": "word_transform.WordTransform", "max_seq_len": 11}
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump({"transform": transform, "data": data}))
    return file


def test_files_of_the_command_line(folder, capsys):
    file = str(config(folder))
    assert main(["check-data", str(folder / "good.jsonl"), "--config", file]) == 0
    assert capsys.readouterr().out.startswith("3 rows: 0 errors, 0 too long")
    assert main(["check-data", *map(str, folder.glob("*.json*")), "--config", file]) == 1
    out = capsys.readouterr().out
    assert out.startswith("5 rows: 1 errors, 0 too long")
    assert f"{folder / 'bad.json'}: 1 errors\n  row 1: the conversation has <image> 1 times" in out


def test_files_of_the_configuration(folder, capsys):
    train = [{"path": str(folder / "good.jsonl"), "weight": 2.0, "format": "llava"}]
    file = config(folder, train=train, test=str(folder / "bad.json"))
    assert main(["check-data", "--config", str(file)]) == 1
    assert capsys.readouterr().out.startswith("5 rows: 1 errors")


def test_mistakes_are_one_sentence(folder, capsys):
    file = config(folder, train=[{"path": 3, "wieght": 1.0}, {"weight": "1"}])
    assert main(["check-data", "--config", str(file)]) == 1
    error = capsys.readouterr().err
    assert "data.train[0]: unknown key wieght; there are path, format, weight, image_root" in error
    assert "data.train[0]: path must be the path of a file, got 3" in error
    assert "data.train[1]: weight cannot be '1'" in error
    assert main(["check-data", "--config", str(config(folder))]) == 1
    assert "Name files to check, or give" in capsys.readouterr().err
    file.write_text("data: {train: a.json}")
    assert main(["check-data", "--config", str(file)]) == 1
    assert "has no section transform" in capsys.readouterr().err
