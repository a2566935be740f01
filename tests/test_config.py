"""Every option of training is a flag, and may stand in a file."""

import dataclasses

import pytest

from training.config import TrainConfig, parse_arguments


def test_without_flags_the_defaults_hold():
    assert parse_arguments([]) == TrainConfig()


def test_every_option_is_a_flag():
    for field in dataclasses.fields(TrainConfig):
        flag = f"--{field.name.replace('_', '-')}"
        value = getattr(TrainConfig(), field.name)
        if isinstance(value, bool):
            assert getattr(parse_arguments([flag]), field.name) is True
            assert getattr(parse_arguments([f"--no-{flag[2:]}"]), field.name) is False
        elif isinstance(value, tuple):
            assert getattr(parse_arguments([f"{flag}=coco=1"]), field.name) == ("coco=1",)
        elif field.metadata["choices"]:
            other = field.metadata["choices"][-1]
            assert getattr(parse_arguments([flag, other]), field.name) == other
        else:
            other = {int: 3, float: 0.25, str: "other"}[type(value)]
            # Views need the block below which they are cached.
            assert getattr(parse_arguments(["--finetune-from=features.4", f"{flag}={other}"]), field.name) == other


def test_a_flag_given_several_times_keeps_all_values_and_replaces_those_of_the_file(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('data = ["flickr8k", "pets=photos/captions.csv"]\n')
    assert parse_arguments(["--config", str(path)]).data == ("flickr8k", "pets=photos/captions.csv")
    flags = ["--data", "coco", "--data", "captions.jsonl", "--data-weight", "coco=0.5"]
    assert parse_arguments(["--config", str(path), *flags]).data == ("coco", "captions.jsonl")
    assert parse_arguments(flags).data_weight == ("coco=0.5",)


def test_a_file_sets_options_and_a_flag_wins_over_it(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('learning_rate = 1\nbatch-size = 64\nencoder = "resnet101"\naugment = false\n')
    config = parse_arguments(["--config", str(path), "--batch-size", "16"])
    assert (config.learning_rate, config.batch_size, config.encoder, config.augment) == (1.0, 16, "resnet101", False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour = 1", "no option 'colour'"),
        ('batch_size = "many"', "batch_size should be a int"),
        ("augment = 1", "augment should be a bool"),
        ("= 1", "recipe.toml"),
        (None, "recipe.toml"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(tmp_path, capsys, text, message):
    path = tmp_path / "recipe.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as exit_:
        parse_arguments(["--config", str(path)])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--batch-size", "0"],
        ["--dropout", "1"],
        ["--epochs", "-1"],
        ["--scheduled-sampling", "1.5"],
        ["--crop-area", "0"],
        ["--colour-change", "2"],
        ["--monitor", "love"],
        ["--speed", "9"],
        ["--grid", "x"],
    ],
)
def test_a_flag_that_makes_no_sense_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_arguments(arguments)
    assert exit_.value.code == 2
    assert arguments[0].lstrip("-").replace("-", "_") in capsys.readouterr().err.replace("-", "_")


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("/usr/bin/captioner-evaluate", "captioner-train"),
        ("C:/Scripts/captioner-train.exe", "captioner-train"),
        ("/home/me/training/train.py", "python -m training.train"),
    ],
)
def test_help_names_the_command_as_it_can_be_run(monkeypatch, capsys, program, expected):
    monkeypatch.setattr("sys.argv", [program])
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    assert capsys.readouterr().out.startswith(f"usage: {expected} ")
