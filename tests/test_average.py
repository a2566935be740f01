"""The mean of models is a model."""

import torch
from conftest import small_model

from captioner.api import Captioner
from captioner.checkpoint import Checkpoint, load_checkpoint
from captioner.images import Preprocessing
from captioner.vocabulary import Vocabulary
from training.average import main
from training.optimisation import build_average

WORDS = Vocabulary([f"word{number}" for number in range(36)])


def saved(folder, seed, words=WORDS, **changes):
    model = small_model(len(words), seed=seed, **changes)
    Captioner(Checkpoint(model, words, Preprocessing(size=(64, 64)), {"seed": seed})).save_pretrained(folder)
    return str(folder)


def test_every_weight_is_the_mean_of_its_own(tmp_path):
    folders = [saved(tmp_path / str(seed), seed) for seed in range(3)]
    assert main([*folders, "--output", str(tmp_path / "mean")]) == 0
    states = [load_checkpoint(folder).model.state_dict() for folder in folders]
    found = load_checkpoint(tmp_path / "mean")
    for name, tensor in found.model.state_dict().items():
        expected = sum(state[name].double() for state in states) / 3
        assert torch.allclose(tensor.double(), expected, atol=1e-6), name
    assert found.about == {"mean of": [{"seed": seed} for seed in range(3)]}


def test_models_that_do_not_fit_each_other_are_refused(tmp_path, capsys):
    one = saved(tmp_path / "one", 0)
    others = [
        saved(tmp_path / "wider", 0, hidden_size=10),
        saved(tmp_path / "words", 0, Vocabulary([f"other{number}" for number in range(36)])),
        "/no/such/model",
    ]
    for other, message in zip(others, ("same sizes", "same words", "/no/such/model"), strict=True):
        assert main([one, other, "--output", str(tmp_path / "mean")]) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "mean").exists()


def test_the_moving_average_follows_trained_weights_and_leaves_frozen_ones():
    model = small_model(len(WORDS))
    model.encoder.train_from(None)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    average = build_average(model, decay=0.9)
    average.update_parameters(model)
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(1)
        average.update_parameters(model)
    # The decay of the second and third update is (1 + n) / (10 + n): 2/11, then 3/12.
    mean = 0.25 * (9 / 11) + 0.75 * 2
    for name, parameter in average.module.named_parameters():
        expected = before[name] if name.startswith("encoder.") else before[name] + mean
        assert torch.allclose(parameter, expected, atol=1e-5), name
