"""A model that was loaded quantised is adapted by factors of its float weights, from a basis file."""

import pytest
import torch
from quantised_support import CASES, CONFIGS, needs_bitsandbytes, quantised_plain
from safetensors.torch import save_file
from tiny_models import IDS, Net, bert, gpt2
from torch import nn

import fastspec
from fastspec import SpectralConfig, load_adapter, save_adapter, spectralize
from fastspec.cli import main
from fastspec.model.adapter_file import AdapterError
from fastspec.model.quantized import quantize_base
from fastspec.model.targets import spectral_layers
from fastspec.nn.quantized import QuantizedSpectralLinear

CONFIG = SpectralConfig(rank=4)


def net(seed=0):
    torch.manual_seed(seed)
    return Net()


def factorised(model, folder, rank=4):
    """A basis file of a model's float weights, by the command."""
    folder.mkdir(exist_ok=True)
    save_file(
        {n: t.contiguous() for n, t in model.state_dict().items()}, folder / "float.safetensors"
    )
    basis = folder / "basis.safetensors"
    assert (
        main(
            ["factorize", str(folder / "float.safetensors"), "--rank", str(rank), "-o", str(basis)]
        )
        == 0
    )
    return basis


def factorised_folder(folder, basis):
    assert main(["factorize", str(folder), "--rank", "4", "-o", str(basis)]) == 0
    return basis


def shift(model, seed=1):
    g = torch.Generator().manual_seed(seed)
    for _, layer in spectral_layers(model):
        layer.delta.data.copy_(0.3 * torch.randn(layer.delta.shape, generator=g))
    return model


@pytest.fixture(scope="module")
def basis(tmp_path_factory):
    return factorised(net(), tmp_path_factory.mktemp("basis"))


@pytest.mark.parametrize("config", CASES)
def test_it_is_the_model_that_was_quantised_after_it_was_adapted(basis, config):
    model = spectralize(quantised_plain(net(), config), CONFIG, basis=basis)
    other = quantize_base(spectralize(net(), CONFIG), config)
    assert torch.equal(model(IDS), other(IDS))
    shift(model), shift(other)
    torch.testing.assert_close(model(IDS), other(IDS))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, p in other.named_parameters() if p.requires_grad
    }
    model(IDS).square().sum().backward()
    assert all(layer.delta.grad.any() for _, layer in spectral_layers(model))


@pytest.mark.parametrize("config", CASES)
def test_its_adapters(basis, config, tmp_path):
    """With their bases they load into the quantised model itself, without into one that has a basis."""
    model = shift(spectralize(quantised_plain(net(), config), CONFIG, basis=basis))
    save_adapter(model, tmp_path / "whole", bases=True)
    save_adapter(model, tmp_path / "short")
    loaded = load_adapter(quantised_plain(net(), config), tmp_path / "whole")
    assert torch.equal(loaded(IDS), model(IDS))
    loaded = spectralize(quantised_plain(net(), config), CONFIG, basis=basis)
    assert torch.equal(load_adapter(loaded, tmp_path / "short")(IDS), model(IDS))
    with pytest.raises(AdapterError, match=r"basis=FILE"):
        load_adapter(quantised_plain(net(), config), tmp_path / "short")
    with pytest.raises(AdapterError, match="other base weights"):
        load_adapter(quantised_plain(net(1), config), tmp_path / "whole")


@pytest.mark.parametrize("config", CASES)
def test_its_plain_model_comes_back(basis, config):
    plain = quantised_plain(net(), config)
    kinds = [type(module) for module in plain.modules()]
    y = plain(IDS)
    model = fastspec.unload(shift(spectralize(plain, CONFIG, basis=basis)))
    assert [type(module) for module in model.modules()] == kinds
    assert torch.equal(model(IDS), y)


@pytest.mark.parametrize("config", CASES)
def test_factors_of_other_weights_are_refused(basis, config, tmp_path):
    plain = quantised_plain(net(1), config)
    y = plain(IDS)
    with pytest.raises(
        ValueError, match=r"blocks\.0\.up: .* factors of other weights than those quan"
    ):
        spectralize(plain, CONFIG, basis=basis)
    assert torch.equal(plain(IDS), y)
    assert not list(spectral_layers(plain))
    swapped = net()
    swapped.blocks[0], swapped.blocks[1] = swapped.blocks[1], swapped.blocks[0]
    with pytest.raises(ValueError, match=r"factors of other weights"):
        spectralize(quantised_plain(net(), config), CONFIG, basis=factorised(swapped, tmp_path))


def test_without_factors_it_is_refused_as_ever(basis):
    with pytest.raises(TypeError, match=r"blocks\.0\.up: .*quantised.* give them as spectralize"):
        spectralize(quantised_plain(net(), CONFIGS["int8"]), CONFIG)
    with pytest.raises(ValueError, match=r"holds 4 triplets and triplets 0 to 5"):
        spectralize(quantised_plain(net(), CONFIGS["int8"]), SpectralConfig(rank=5), basis=basis)


def test_a_layer_of_no_name_in_the_file(tmp_path):
    basis = factorised(net().blocks[0], tmp_path)  # its names are up and down
    with pytest.raises(ValueError, match=r"factors of other weights|no factors of that name"):
        spectralize(quantised_plain(net(), CONFIGS["int8"]), CONFIG, basis=basis)
    inner = quantised_plain(net(), CONFIGS["int8"])
    whole = nn.ModuleDict({"inner": inner})
    with pytest.raises(ValueError, match=r"inner\.blocks\.0\.up: .*no factors of that name"):
        spectralize(
            whole, CONFIG, basis=factorised(nn.ModuleDict({"a": net().blocks}), tmp_path / "b")
        )


def test_names_below_a_wrapper_are_found(basis):
    whole = nn.ModuleDict({"inner": quantised_plain(net(), CONFIGS["int8"])})
    spectralize(whole, CONFIG, basis=basis)
    assert [n for n, layer in spectral_layers(whole) if type(layer) is QuantizedSpectralLinear] == [
        f"inner.blocks.{i}.{leaf}" for i in (0, 1) for leaf in ("up", "down")
    ]
    assert "weight=Int8Tensor" in repr(whole)


@needs_bitsandbytes
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_a_model_that_transformers_loads_in_four_bits(tmp_path, compute):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    bert(**sizes).save_pretrained(tmp_path / "bert")
    basis = factorised(bert(**sizes), tmp_path / "basis")
    options = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": compute,
    }
    load = type(bert()).from_pretrained
    four = transformers.BitsAndBytesConfig(**options)
    with pytest.raises(ValueError, match=r"classifier\.weight is to be trained and is quantised"):
        spectralize(load(tmp_path / "bert", quantization_config=four), CONFIG, basis=basis)
    four = transformers.BitsAndBytesConfig(**options, llm_int8_skip_modules=["classifier"])
    ids = torch.arange(16).reshape(2, 8)

    def plain():  # its first call would cast its biases
        return load(tmp_path / "bert", quantization_config=four).eval()

    model = spectralize(plain(), CONFIG, basis=basis)
    assert torch.equal(model(ids).logits, plain()(ids).logits)
    model.train()(ids, labels=torch.tensor([0, 1])).loss.backward()
    assert all(layer.delta.grad.any() for _, layer in spectral_layers(model))
    shift(model.eval())
    save_adapter(model, tmp_path / "adapter", bases=True)
    again = load_adapter(plain(), tmp_path / "adapter")
    assert torch.equal(again(ids).logits, model(ids).logits)


@needs_bitsandbytes
def test_gpt2_whose_layers_are_stored_the_other_way_round(tmp_path):
    transformers = pytest.importorskip("transformers")
    plain = gpt2(n_embd=64)
    plain.save_pretrained(tmp_path / "gpt2")
    basis = factorised_folder(tmp_path / "gpt2", tmp_path / "basis.safetensors")
    four = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = type(plain).from_pretrained(tmp_path / "gpt2", quantization_config=four)
    spectralize(model, CONFIG, basis=basis)
    assert sum(type(layer) is QuantizedSpectralLinear for _, layer in spectral_layers(model)) == 8
    ids = torch.arange(16).reshape(2, 8)
    model(ids, labels=ids).loss.backward()
    assert all(layer.delta.grad.any() for _, layer in spectral_layers(model))


@needs_bitsandbytes
def test_a_weight_that_was_packed_for_inference_is_refused_in_words(basis):
    plain = quantised_plain(net(), "nf4")
    plain.blocks[0].up.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"blocks\.0\.up: .* adapt the model before it is called"):
        spectralize(plain, CONFIG, basis=basis)


def test_a_head_that_torchao_quantised_is_refused(basis):
    from torchao.quantization import quantize_

    plain = net()
    quantize_(plain, CONFIGS["int8"])
    with pytest.raises(ValueError, match=r"head\.weight is to be trained and is quantised"):
        spectralize(plain, SpectralConfig(rank=4, modules_to_save=["head"]), basis=basis)
    assert type(plain.blocks[0].up) is nn.Linear


@needs_bitsandbytes
def test_trainer_takes_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    bert(**sizes).save_pretrained(tmp_path / "bert")
    basis = factorised(bert(**sizes), tmp_path / "basis")
    four = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["classifier"]
    )

    def adapted():
        plain = type(bert()).from_pretrained(tmp_path / "bert", quantization_config=four)
        return spectralize(plain, CONFIG, basis=basis)

    rows = [{"input_ids": list(range(6)), "labels": i % 2} for i in range(8)]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "out"), num_train_epochs=1, use_cpu=True, report_to="none"
    )
    model = adapted()
    trainer = fastspec.SpectralTrainer(model, arguments, train_dataset=rows)
    trainer.train()
    assert all(layer.delta.any() for _, layer in spectral_layers(model))
    assert "_hf_peft_config_loaded" not in vars(model)
    trainer.save_model(tmp_path / "adapter")
    ids = torch.arange(6)[None]
    again = load_adapter(adapted(), tmp_path / "adapter")
    torch.testing.assert_close(again.eval()(ids).logits, model.eval()(ids).logits)
    plain = type(bert()).from_pretrained(tmp_path / "bert", quantization_config=four)
    with pytest.raises(ValueError, match="purely quantized"):  # without an adapter, as ever
        fastspec.SpectralTrainer(plain, arguments, train_dataset=rows)


def test_no_merged_copy_is_kept(basis):
    model = spectralize(quantised_plain(net(), CONFIGS["int8"]), CONFIG, basis=basis)
    with pytest.raises(ValueError, match="a merged copy needs the base weight in floating point"):
        fastspec.keep_merged(model)
