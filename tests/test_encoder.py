"""Any torchvision network gives annotation vectors, with the weights that were asked for."""

import functools
import http.server
import pickle
import threading

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from captioner.encoder import Encoder


@pytest.mark.parametrize(
    ("name", "channels", "node"),
    [
        ("mobilenet_v2", 1280, "features"),
        ("mobilenet_v3_large", 960, "features"),
        ("vgg19", 512, "features.35"),
        ("resnet50", 2048, "layer4"),
        ("resnet101", 2048, "layer4"),
        ("efficientnet_b0", 1280, "features"),
        ("convnext_tiny", 768, "features"),
    ],
)
def test_a_network_by_name_gives_annotation_vectors(name, channels, node):
    encoder = Encoder(name, grid=(2, 2))
    assert (encoder.channels, encoder.node) == (channels, node)
    with torch.no_grad():
        assert encoder(torch.randn(2, 3, 64, 64)).shape == (2, 4, channels)


def test_a_network_that_needs_images_above_a_size_can_be_read():
    encoder = Encoder("inception_v3", node="Mixed_7c", grid=(1, 1))
    with torch.no_grad():
        assert encoder(torch.randn(1, 3, 96, 96)).shape == (1, 1, 2048)


def test_regions_run_row_by_row_from_the_top_left():
    encoder = Encoder("mobilenet_v2", grid=(2, 4))
    images = torch.randn(1, 3, 64, 128)
    with torch.no_grad():
        regions = encoder(images)
        feature_map = encoder.body(images)["map"]
    assert torch.allclose(regions[0].unflatten(0, (2, 4)), feature_map[0].permute(1, 2, 0), atol=1e-5)


@pytest.mark.parametrize("grid", [(7, 7), (14, 14), (3, 5)])
def test_any_grid_can_be_had(grid):
    with torch.no_grad():
        assert Encoder("mobilenet_v2", grid=grid)(torch.randn(1, 3, 96, 96)).shape == (1, grid[0] * grid[1], 1280)


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18", "vgg11"])
def test_regions_are_seen_from_where_the_encoder_says(name):
    """The middle of a region's receptive field: the mean place of the gradient of an equally weighted network."""
    encoder = Encoder(name, grid=(12, 12))
    for module in encoder.body.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.constant_(module.weight, 1 / module.weight[0].numel())
    torch.manual_seed(0)
    images = (torch.rand(4, 3, 384, 384) * 1e-4).requires_grad_()  # far from where ReLU6 ends
    encoder.body(images)["map"].abs().sum(dim=(0, 1))[6, 6].backward()
    weight = images.grad.abs().sum(dim=(0, 1))
    middle = 6.5 * 384 / encoder.body(images)["map"].shape[2] - 0.5
    for axis in (0, 1):
        seen_from = float(weight.sum(dim=axis) @ torch.arange(384.0) / weight.sum())
        assert seen_from == pytest.approx(middle - encoder.displacement, abs=2)


def test_an_earlier_node_can_be_read():
    encoder = Encoder("mobilenet_v2", node="features.13", grid=(4, 4))
    with torch.no_grad():
        assert encoder(torch.randn(1, 3, 64, 64)).shape == (1, 16, 96)


def test_training_leaves_batch_norm_statistics_alone():
    encoder = Encoder("mobilenet_v2").train()
    before = {name: tensor.clone() for name, tensor in encoder.named_buffers()}
    encoder(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.named_buffers())


def test_only_what_lies_above_the_block_is_trained():
    encoder = Encoder("mobilenet_v2")
    encoder.train_from("features.14")
    for name, parameter in encoder.body.named_parameters():
        assert parameter.requires_grad == (int(name.split(".")[1]) >= 14), name
    encoder.train_from("")
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    encoder.train_from(None)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_features_1_is_not_taken_for_features_10():
    encoder = Encoder("mobilenet_v2")
    encoder.train_from("features.1")
    assert dict(encoder.body.named_parameters())["features.1.conv.0.0.weight"].requires_grad
    assert not dict(encoder.body.named_parameters())["features.0.0.weight"].requires_grad


def test_convolutions_may_run_in_bfloat16_and_still_give_float32():
    encoder = Encoder("mobilenet_v2", grid=(2, 2))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        exact = encoder(images)
        encoder.autocast_dtype = torch.bfloat16
        rough = encoder(images)
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    assert torch.allclose(rough, exact, atol=0.1 * float(exact.abs().max()))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return torchvision.models.mobilenet_v2()


def same_weights(encoder, network):
    own = encoder.body.state_dict()
    return all(torch.equal(tensor, own[name]) for name, tensor in network.state_dict().items() if name in own)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_come_from_a_local_file(network, tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    save_file(network.state_dict(), path) if suffix == ".safetensors" else torch.save(network.state_dict(), path)
    assert same_weights(Encoder("mobilenet_v2", weights=path), network)
    assert not same_weights(Encoder("mobilenet_v2"), network)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local server in the place of the host that torchvision downloads weights from."""
    (tmp_path / "served").mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "served")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        import torchvision.models._api as api

        download = api.load_state_dict_from_url

        def from_here(url, *args, **kwargs):
            local = f"http://127.0.0.1:{running.server_port}/{url.rpartition('/')[2]}"
            return download(local, *args, **kwargs | {"model_dir": str(tmp_path), "check_hash": False})

        monkeypatch.setattr(api, "load_state_dict_from_url", from_here)
        yield tmp_path / "served"
        running.shutdown()


def test_weights_by_name_are_downloaded_by_torchvision(network, server):
    name = torchvision.models.MobileNet_V2_Weights.DEFAULT.url.rpartition("/")[2]
    torch.save(network.state_dict(), server / name)
    assert same_weights(Encoder("mobilenet_v2", weights="DEFAULT"), network)


def test_weights_that_cannot_be_downloaded_are_one_clear_error(server):
    with pytest.raises(ValueError, match="cannot download the weights 'DEFAULT' of mobilenet_v2"):
        Encoder("mobilenet_v2", weights="DEFAULT")


def explode():
    raise AssertionError("a pickle was executed")


class Bomb:
    def __reduce__(self):
        return (explode, ())


def test_weights_are_never_unpickled(tmp_path):
    (tmp_path / "bomb.pth").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"bomb\.pth"):
        Encoder("mobilenet_v2", weights=tmp_path / "bomb.pth")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "mobilenet_v9"}, "mobilenet_v9"),
        ({"node": "nowhere"}, "it has .*features.18"),
        ({"node": "classifier"}, "not a feature map"),
        ({"weights": "IMAGENET9K"}, "IMAGENET9K"),
        ({"weights": "no-such-file.pth"}, "not a file"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(arguments, message):
    with pytest.raises(ValueError, match=message):
        Encoder(**arguments)


def test_an_unknown_block_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"features\.18"):
        Encoder("mobilenet_v2").train_from("layer4")


def test_a_truncated_weights_file_is_refused(network, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(network.state_dict(), path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"weights\.safetensors"):
        Encoder("mobilenet_v2", weights=path)
