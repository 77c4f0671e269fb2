"""Image classifiers: every family learns, a new head for other classes, and what the processor file says."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AttentionInterface,
    AutoImageProcessor,
    AutoModelForImageClassification,
    GPT2Config,
    PreTrainedModel,
    ViTConfig,
)

from truthgpt.data.base import ImageExample
from truthgpt.data.images import ImageDataset, ImageTransform
from truthgpt.errors import ConfigError
from truthgpt.models.image_classifier import (
    build_image_classifier,
    image_classification_loss,
    load_image_architecture,
    load_image_classifier,
)
from truthgpt.models.image_processor import PROCESSOR_FILE, PixelFormat, pixel_format_of

torch.set_num_threads(1)

CLASSES = ["cat", "dog", "emu"]
ENCODER = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "vit": ENCODER,
    "deit": ENCODER,
    "dinov2": {key: value for key, value in ENCODER.items() if key != "intermediate_size"},
    "swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "image_size": 32},
    "convnext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 32},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    "siglip": {"vision_config": ENCODER},
}
NO_ATTENTION = {"convnext", "resnet"}
VIT: dict[str, Any] = {"model_type": "vit", **ENCODER}


def architecture(values: dict[str, Any], name: str | None = None, classes: list[str] = CLASSES) -> Any:
    return load_image_architecture(name, values, classes, trust_remote_code=False)


def own_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What this project said; transformers' own report is quiet in a run."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("truthgpt")]


def batch(classes: int = 3) -> dict[str, torch.Tensor]:
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "labels": torch.arange(4) % classes}


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ViT with three classes, as transformers saves it."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(1)
    labels = dict(enumerate(CLASSES))
    model = AutoModelForImageClassification.from_config(ViTConfig(**ENCODER, id2label=labels))
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_forward_and_backward(family: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "truthgpt"):
        model = build_image_classifier(architecture({"model_type": family, **FAMILIES[family]}), "sdpa", seed=0)
    said = own_lines(caplog)
    assert said == ([f"{family} models have no attention that sdpa could replace: not used"] * (family in NO_ATTENTION))
    loss, logits = image_classification_loss(model.train(), batch())
    assert logits().shape == (4, 3)
    picked = logits().double().log_softmax(-1)[torch.arange(4), batch()["labels"]]
    assert loss.item() == pytest.approx(-picked.sum().item(), rel=1e-5)
    loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "vision" in name or family != "siglip"]
    assert sum(g is not None and bool(g.abs().sum() > 0) for g in gradients) > len(gradients) // 2
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_another_attention_function_is_used() -> None:
    called = []

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> tuple[Any, None]:
        called.append(query.shape)
        return torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2), None

    AttentionInterface.register("recorded", attend)
    model, usual = (build_image_classifier(architecture(VIT), name, seed=0).eval() for name in ("recorded", "sdpa"))
    loss, reference = image_classification_loss(model, batch())[0], image_classification_loss(usual, batch())[0]
    assert called == [torch.Size([4, 2, 17, 8])] * 2
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)


def test_an_attention_function_a_network_cannot_use_is_said(caplog: pytest.LogCaptureFixture) -> None:
    AttentionInterface.register("never_called", lambda *arguments, **options: 1 / 0)
    with caplog.at_level(logging.INFO, "truthgpt"):
        model = build_image_classifier(architecture({"model_type": "resnet", **FAMILIES["resnet"]}), "never_called", 0)
    assert own_lines(caplog) == ["resnet models have no attention that never_called could replace: not used"]
    image_classification_loss(model, batch())


def test_scratch_weights_depend_on_the_seed_only() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = build_image_classifier(architecture(VIT), "sdpa", seed=3)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is not ours"
    torch.rand(5)
    second, other = (build_image_classifier(architecture(VIT), "sdpa", seed=seed) for seed in (3, 4))
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name]), name
    assert not torch.equal(first.classifier.weight, other.classifier.weight)


def test_classes_are_in_the_configuration_that_is_saved(tmp_path: Path) -> None:
    build_image_classifier(architecture(VIT), "sdpa", seed=0).save_pretrained(tmp_path)
    saved = AutoModelForImageClassification.from_pretrained(tmp_path).config
    assert saved.id2label == {0: "cat", 1: "dog", 2: "emu"} and saved.label2id == {"cat": 0, "dog": 1, "emu": 2}


@pytest.mark.parametrize(
    ("overrides", "phrases"),
    [
        ({"model_type": "vitt"}, ["no image classifier of type 'vitt'", "did you mean", "vit"]),
        ({"model_type": "gpt2"}, ["no image classifier of type 'gpt2'"]),
        ({"model_type": "imagegpt"}, ["no image classifier of type 'imagegpt'"]),
        ({**VIT, "hiden_size": 8}, ["model.config.hiden_size", "did you mean hidden_size"]),
        ({**VIT, "num_labels": 2}, ["model.config.num_labels: the classes come from the data"]),
        ({**VIT, "id2label": {0: "a"}, "label2id": {}}, ["model.config.id2label", "model.config.label2id"]),
    ],
)
def test_mistakes_are_named(overrides: dict[str, Any], phrases: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        architecture(overrides)
    for phrase in phrases:
        assert phrase in str(caught.value)


def test_a_folder_with_another_kind_of_model(tmp_path: Path) -> None:
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.name_or_path: .*is a gpt2 model: transformers has no image classif"):
        architecture({}, str(tmp_path))


def load(folder: Path, classes: list[str], seed: int = 0, **overrides: Any) -> PreTrainedModel:
    config = architecture(overrides, str(folder), classes)
    return load_image_classifier(str(folder), config, "sdpa", seed, trust_remote_code=False)


def test_pretrained_with_the_same_classes(vit_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "truthgpt"):
        model = load(vit_folder, CLASSES)
    assert own_lines(caplog) == []
    reference = AutoModelForImageClassification.from_pretrained(vit_folder).state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, reference[name]), name


def test_as_many_classes_under_other_names_are_said(vit_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "truthgpt"):
        model = load(vit_folder, ["cat", "fox", "emu"])
    (said,) = own_lines(caplog)
    assert said.endswith("has as many classes under other names, for example dog, here fox")
    assert model.config.id2label[1] == "fox"


def test_another_number_of_classes_gets_a_new_head(vit_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "truthgpt"):
        model = load(vit_folder, ["a", "b", "c", "d", "e"], seed=1)
    (said,) = own_lines(caplog)
    assert said.endswith("a new head for 5 classes (it had 3)")
    assert image_classification_loss(model, batch(5))[1]().shape == (4, 5)
    reference = AutoModelForImageClassification.from_pretrained(vit_folder).state_dict()
    for name, weight in model.state_dict().items():
        assert name.startswith("classifier") or torch.equal(weight, reference[name]), name
    torch.rand(3)
    again, other = (load(vit_folder, ["a", "b", "c", "d", "e"], seed) for seed in (1, 2))
    assert torch.equal(again.classifier.weight, model.classifier.weight), "the new head depends on the seed only"
    assert not torch.equal(other.classifier.weight, model.classifier.weight)


def test_weights_that_do_not_fit_or_are_not_there(vit_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"classifier\.weight has the shape \[3, 16\] there and \[3, 32\] in model\.config"
    ):
        load(vit_folder, CLASSES, hidden_size=32)
    with pytest.raises(ConfigError, match=r"position_embeddings has the shape \[1, 17, 16\] there and \[1, 65, 16\]"):
        load(vit_folder, CLASSES, image_size=64)
    (tmp_path / "config.json").write_text((vit_folder / "config.json").read_text())
    with pytest.raises(ConfigError, match=r"model\.init: scratch"):
        load(tmp_path, CLASSES)


def test_missing_weights_are_reported(vit_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "truthgpt"):
        load(vit_folder, CLASSES, num_hidden_layers=3)
    (said,) = own_lines(caplog)
    assert "missing weights, for example" in said and ".2." in said


# What a model expects of its images


@pytest.mark.parametrize(
    ("values", "size", "channels"),
    [
        (VIT, (32, 32), 3),
        ({**VIT, "image_size": [16, 24], "num_channels": 1}, (16, 24), 1),
        ({"model_type": "resnet"}, (224, 224), 3),
        ({"model_type": "siglip", "vision_config": ENCODER}, (32, 32), 3),
    ],
)
def test_pixels_of_a_model_from_scratch(values: dict[str, Any], size: tuple[int, int], channels: int) -> None:
    half = (0.5,) * channels
    assert pixel_format_of(architecture(values), None) == PixelFormat(size, channels, half, half)


def test_image_size_is_for_models_that_name_none() -> None:
    assert pixel_format_of(architecture({"model_type": "resnet"}), None, image_size=64).size == (64, 64)
    assert pixel_format_of(architecture(VIT), None, image_size=32).size == (32, 32)
    with pytest.raises(
        ConfigError, match=r"takes images of 32 x 32 pixels, not 64 x 64 .*model\.config\.image_size: 64"
    ):
        pixel_format_of(architecture(VIT), None, image_size=64)
    with pytest.raises(ConfigError, match=r"model\.config\.num_channels: images have 3 channels .* not 4"):
        pixel_format_of(architecture({**VIT, "num_channels": 4}), None)


def test_mean_and_std_of_a_pretrained_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = architecture(VIT)
    config.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "truthgpt"):
        assert pixel_format_of(config, str(tmp_path)).mean == (0.5, 0.5, 0.5)
    assert "has no preprocessor_config.json" in own_lines(caplog)[0]
    file = tmp_path / PROCESSOR_FILE
    file.write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": 0.25}))
    found = pixel_format_of(config, str(tmp_path))
    assert (found.mean, found.std) == ((0.1, 0.2, 0.3), (0.25, 0.25, 0.25))
    found.save_pretrained(tmp_path)
    assert pixel_format_of(config, str(tmp_path)) == found
    file.write_text("{}")
    assert pixel_format_of(config, str(tmp_path)).mean == (0.5, 0.5, 0.5)
    for text, reason in (
        ("{", "cannot be read"),
        ("[]", "no JSON object"),
        ('{"image_mean": [0.1]}', r"image_mean is \[0\.1\]; 3 numbers"),
        ('{"image_mean": ["a", "b", "c"]}', "3 numbers"),
        ('{"image_std": [0, 1, 1]}', "image_std"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=rf"preprocessor_config\.json: .*{reason}"):
            pixel_format_of(config, str(tmp_path))


class OneImage:
    """A source of one image."""

    classes = ("a", "b")

    def __init__(self, file: Path) -> None:
        self.file = file

    def keys(self) -> list[str]:
        return [self.file.name]

    def read(self, index: int) -> ImageExample:
        return ImageExample(self.file.read_bytes(), 0, str(self.file))

    def fingerprint(self) -> str:
        return self.file.name


@pytest.mark.parametrize(("width", "height"), [(40, 40), (50, 33), (31, 77), (10, 9)])
@pytest.mark.parametrize("size", [(32, 32), (24, 36)])
@pytest.mark.parametrize("channels", [3, 1])
def test_transformers_prepares_images_as_training_does(
    tmp_path: Path, width: int, height: int, size: tuple[int, int], channels: int
) -> None:
    generator = np.random.default_rng(width)
    pixels = generator.integers(0, 256, size=(height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels) if channels == 3 else Image.fromarray(pixels[..., 0])
    image.save(tmp_path / "image.png")
    expected = PixelFormat(size, channels, (0.48, 0.45, 0.41)[:channels], (0.26, 0.25, 0.27)[:channels])
    expected.save_pretrained(tmp_path)
    # Without torchvision, transformers resizes with Pillow, as we do; torchvision's own resizing rounds otherwise.
    try:
        processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    except ImportError as error:  # transformers 5.17 asks for torchvision whatever the backend
        pytest.skip(f"transformers' own processor cannot run: {' '.join(str(error).split())[:80]}")
    theirs = processor(Image.open(tmp_path / "image.png"), return_tensors="np")["pixel_values"][0]
    transform = ImageTransform(expected.size, expected.channels, expected.mean, expected.std)
    ours = ImageDataset(OneImage(tmp_path / "image.png"), np.arange(1), transform, 0, False, "").read(0)
    assert ours["pixel_values"].shape == theirs.shape == (channels, *size)
    assert np.abs(ours["pixel_values"] - theirs).max() < 1e-6
