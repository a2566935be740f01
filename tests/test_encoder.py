"""Any torchvision network gives annotation vectors, with the weights that were asked for."""

import functools
import http.server
import pickle
import re
import threading

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from captioner.images import Preprocessing
from captioner.network.encoder import Encoder, Layout, adapted, normalisation
from training.config import TrainConfig
from training.train import build_preprocessing

NETWORKS = torchvision.models.list_models(module=torchvision.models)


@pytest.fixture
def regnets_on_the_meta_device(monkeypatch):
    """RegNets compute their sizes with tensors, which need values."""
    params = torchvision.models.regnet.BlockParams
    compute = params.from_init_params

    def with_values(*arguments, **options):
        with torch.device("cpu"):
            return compute(*arguments, **options)

    monkeypatch.setattr(params, "from_init_params", with_values)


@pytest.mark.filterwarnings("error")
@pytest.mark.usefixtures("regnets_on_the_meta_device")
@pytest.mark.parametrize("name", NETWORKS)
def test_every_classification_network_of_torchvision_gives_annotation_vectors(name):
    with torch.device("meta"):  # shapes alone: even the largest is built in a moment
        encoder = Encoder(name, grid=(2, 3))
        assert encoder(torch.empty(2, 3, 224, 224)).shape == (2, 6, encoder.channels)
    assert encoder.channels >= 256
    mean, std = normalisation(name, "weights.pth")
    assert Preprocessing.from_dict(Preprocessing((224, 224), mean, std).to_dict()).mean == mean


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


@pytest.mark.parametrize(("name", "size"), [("inception_v3", 32), ("vit_b_32", 256), ("maxvit_t", 64)])
def test_an_image_of_a_size_that_the_network_cannot_read_is_one_clear_error(name, size, capfd):
    with torch.device("meta"):
        encoder = Encoder(name, grid=(1, 1))
        with pytest.raises(ValueError, match=f"^{name} cannot read images of {size} x {size} pixels; 224 x 224 is"):
            encoder(torch.empty(1, 3, size, size))
        assert encoder(torch.empty(1, 3, 224, 224)).shape == (1, 1, encoder.channels)
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_map_with_its_channels_last_is_turned():
    encoder = Encoder("swin_t", node="features.3", grid=(6, 12))
    images = torch.randn(1, 3, 48, 96)
    with torch.no_grad():
        found = encoder.body(images)["map"]
        assert found.shape == (1, 6, 12, 192)
        assert torch.equal(encoder(images), found.flatten(1, 2))


def test_the_patches_of_a_vision_transformer_are_its_regions_and_its_class_token_is_none():
    encoder = Encoder("vit_b_32")
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        tokens = encoder.body(images)["map"]
        assert tokens.shape == (2, 1 + 49, 768)
        assert torch.equal(encoder(images), tokens[:, 1:])


def test_the_last_map_of_a_densenet_has_passed_its_last_relu():
    torch.manual_seed(0)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        last = Encoder("densenet121", grid=(2, 2))(images)
        before = Encoder("densenet121", node="features", grid=(2, 2))(images)
    assert (before < 0).any()
    assert (last >= 0).all()
    assert (last == 0).any()


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


@pytest.mark.parametrize(
    "name", ["mobilenet_v2", "resnet18", "vgg11", "densenet121", "efficientnet_b0", "mnasnet0_5", "squeezenet1_1"]
)
def test_regions_are_seen_from_where_the_encoder_says(name):
    """The middle of a region's receptive field: the mean place of the gradient of an equally weighted network."""
    encoder = Encoder(name, grid=(12, 12))
    for module in encoder.body.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.constant_(module.weight, 1 / module.weight[0].numel())
    torch.manual_seed(0)
    images = (torch.rand(4, 3, 384, 384) * 1e-4).requires_grad_()  # far from where ReLU6 ends
    found = encoder.body(images)["map"].abs().sum(dim=(0, 1))
    region = len(found) // 2
    found[region, region].backward()
    weight = images.grad.abs().sum(dim=(0, 1))
    middle = (region + 0.5) * 384 / len(found) - 0.5
    for axis in (0, 1):
        seen_from = float(weight.sum(dim=axis) @ torch.arange(384.0) / weight.sum())
        assert seen_from == pytest.approx(middle - encoder.displacement, abs=2)


@pytest.mark.parametrize("name", ["swin_t", "vit_b_32", "convnext_tiny"])
def test_regions_of_networks_that_merge_patches_are_seen_from_their_middle(name):
    with torch.device("meta"):
        assert Encoder(name).displacement == 0


@pytest.mark.parametrize(
    ("name", "block", "layout"),
    [
        ("mobilenet_v2", "features.17", Layout.CHANNELS_FIRST),
        ("swin_t", "features.6", Layout.CHANNELS_LAST),
        ("vit_b_32", "encoder.layers.encoder_layer_10", Layout.TOKENS),
    ],
)
def test_a_divided_network_gives_what_the_whole_one_does_and_is_tuned_above_the_cut(name, block, layout):
    encoder = Encoder(name, grid=(3, 3))
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        whole = encoder(images)
        encoder.split(block)
        maps = encoder.lower(images)
    assert encoder.cut_layout is layout
    assert maps.dim() == 4
    encoder.train_from(block)
    found = encoder(maps.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))  # as the cache keeps them
    assert torch.allclose(found, whole, atol=1e-4)
    found.sum().backward()
    names = [parameter_name for parameter_name, parameter in encoder.body.named_parameters() if parameter.requires_grad]
    assert names[0].startswith(block)
    assert all(encoder.body.get_parameter(parameter_name).grad is not None for parameter_name in names)


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


def test_weights_need_no_classifier_but_all_the_rest(network, tmp_path):
    state = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("classifier")}
    save_file(state, tmp_path / "headless.safetensors")
    assert same_weights(Encoder("mobilenet_v2", weights=tmp_path / "headless.safetensors"), network)
    del state["features.3.conv.1.0.weight"]
    save_file(state, tmp_path / "holed.safetensors")
    with pytest.raises(ValueError, match=r"1 tensors are missing, 0 unknown: features\.3\.conv\.1\.0\.weight"):
        Encoder("mobilenet_v2", weights=tmp_path / "holed.safetensors")


@pytest.mark.parametrize("auxiliary", [True, False])
def test_weights_of_networks_with_auxiliary_classifiers_are_read_with_and_without_these(auxiliary, tmp_path):
    torch.manual_seed(0)
    network = torchvision.models.googlenet(init_weights=False, aux_logits=auxiliary, transform_input=True).eval()
    save_file(network.state_dict(), tmp_path / "googlenet.safetensors")
    encoder = Encoder("googlenet", grid=(1, 1), weights=tmp_path / "googlenet.safetensors")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        # Trained on colours from -1 to 1, it is given the normalisation of the others.
        assert torch.allclose(network.fc(encoder(images)[:, 0]), network(images), atol=1e-5)


def test_weights_of_a_densenet_are_read_under_their_old_names(tmp_path):
    network = torchvision.models.densenet121()
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", name): tensor
        for name, tensor in network.state_dict().items()
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    save_file(old, tmp_path / "densenet121.safetensors")
    assert same_weights(Encoder("densenet121", weights=tmp_path / "densenet121.safetensors"), network)


def test_weights_of_a_vision_transformer_for_larger_images_are_resampled():
    sizes = {"patch_size": 16, "num_layers": 1, "num_heads": 1, "hidden_dim": 8, "mlp_dim": 8}
    large = torchvision.models.VisionTransformer(image_size=128, **sizes)
    small = torchvision.models.VisionTransformer(image_size=64, **sizes)
    with torch.no_grad():
        large.encoder.pos_embedding[0, 1:] = torch.arange(8.0).repeat(8)[:, None]  # grows from column to column
    small.load_state_dict(adapted(large.state_dict(), small))
    across = small.encoder.pos_embedding[0, 1:, 0].view(4, 4)
    assert (across.diff(dim=1) > 1).all()
    assert torch.allclose(across, across[:1].expand(4, -1))


@pytest.mark.parametrize(
    ("encoder", "weights", "mean"),
    [
        ("efficientnet_v2_l", "IMAGENET1K_V1", (0.5, 0.5, 0.5)),
        ("efficientnet_v2_l", "my/file.pth", (0.5, 0.5, 0.5)),
        ("efficientnet_v2_l", "", (0.5, 0.5, 0.5)),
        ("densenet169", "DEFAULT", (0.485, 0.456, 0.406)),
    ],
)
def test_a_run_normalises_images_as_the_weights_expect(encoder, weights, mean):
    config = TrainConfig(encoder=encoder, encoder_weights=weights, image_size=96)
    preprocessing = build_preprocessing(config)
    assert (preprocessing.size, preprocessing.mean) == ((96, 96), mean)


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
        (
            {"node": "classifier"},
            r"gives a tensor of shape \(1, 1000\), not a feature map; choose one of .*features.18",
        ),
        ({"name": "vit_b_32", "node": "getitem"}, "gives int, not a feature map; choose one of .*encoder.ln"),
        ({"name": "fcn_resnet50"}, "no classification network 'fcn_resnet50'; it has .*vit_b_16"),
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
