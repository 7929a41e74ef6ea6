"""The models take the arguments that fairseq's Transformer takes, or refuse them in one sentence."""

import inspect

import pytest
import torch
from batches import SMALL, sentences, task
from fairseq.models.transformer import TransformerDecoderBase, TransformerEncoderBase, TransformerModelBase

from fairseq_lrn.models import DeepNMTModel, LRNLanguageModel, LRNModel
from fairseq_lrn.models.lrn_lm import LRNLanguageModelConfig

translators = pytest.mark.parametrize("model_class", [LRNModel, DeepNMTModel])


def build(model_class):
    torch.manual_seed(0)
    sizes = {k: v for k, v in SMALL.items() if k in model_class.config.__dataclass_fields__}
    return model_class.build_model(model_class.config(**sizes), task()).eval()


@pytest.fixture
def source():
    return sentences([5, 9], 1, left=True)


@pytest.fixture
def target():
    return sentences([6, 4], 1, seed=2)


@translators
def test_the_same_arguments_in_the_same_order(model_class):
    model = build(model_class)
    for ours, theirs in (
        (model, TransformerModelBase),
        (model.encoder, TransformerEncoderBase),
        (model.decoder, TransformerDecoderBase),
    ):
        wanted = [*inspect.signature(theirs.forward).parameters][1:]
        assert [*inspect.signature(ours.forward).parameters] == wanted
    wanted = [*inspect.signature(TransformerDecoderBase.extract_features).parameters][1:]
    assert [*inspect.signature(model.decoder.extract_features).parameters][: len(wanted)] == wanted


@translators
def test_extract_features(model_class, source, target):
    model = build(model_class)
    scores, extra = model(source, None, target)
    features, other = model.extract_features(source, None, target)
    encoder_out = model.encoder(source, src_lengths=torch.tensor([5, 9]))
    again, _ = model.decoder.extract_features(target, encoder_out)
    only, _ = model(source, torch.tensor([5, 9]), target, features_only=True)
    assert features.shape == (2, 6, 16)
    for x in (features, again, only):
        torch.testing.assert_close(model.output_layer(x), scores)
    torch.testing.assert_close(other["attn"], extra["attn"])
    first, _ = model.extract_features(source, None, target, alignment_layer=0, alignment_heads=1)
    torch.testing.assert_close(first, features)


@translators
@pytest.mark.parametrize("fast", [False, True], ids=["modules", "prepared"])
@torch.no_grad()
def test_all_hidden_states(model_class, fast, source, target):
    """What goes into the first layer, and comes out of each."""
    model = build(model_class)
    if fast:
        model.make_generation_fast_()
    plain = model.encoder(source)
    assert plain["encoder_states"] == []
    encoder_out = model.encoder(source, return_all_hiddens=True)
    words = source.t().ne(1)  # at padding, anything
    found, expected = (x["encoder_out"][0][words] for x in (encoder_out, plain))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    states = encoder_out["encoder_states"]
    assert [tuple(x.shape) for x in states] == 3 * [(9, 2, 16)]
    if model_class is LRNModel:
        embedded = model.encoder.embed_scale * model.encoder.embed_tokens(source.t())
        last = model.encoder.layer_norm(states[-1])
        torch.testing.assert_close(model.encoder.layers[0](states[0], source.eq(1)), states[1])
    else:
        embedded, last = model.encoder.embed_tokens(source.t()) + model.encoder.embed_bias, states[-1]
    torch.testing.assert_close(states[0], embedded)
    torch.testing.assert_close(last, encoder_out["encoder_out"][0])

    scores, extra = model(source, None, target)
    other, all_extra = model(source, None, target, return_all_hiddens=True)
    torch.testing.assert_close(other, scores)
    assert extra["inner_states"] == []
    inner = all_extra["inner_states"]
    assert [tuple(x.shape) for x in inner] == 3 * [(6, 2, 16)]
    if model_class is LRNModel:
        last = model.decoder.layer_norm(inner[-1]).transpose(0, 1)
        torch.testing.assert_close(model.output_layer(last), scores)

    reordered = model.encoder.reorder_encoder_out(encoder_out, torch.tensor([1, 0]))
    torch.testing.assert_close(reordered["encoder_states"][1], states[1][:, [1, 0]])
    step, extra = model.decoder(target[:, :1], encoder_out, incremental_state={}, return_all_hiddens=True)
    torch.testing.assert_close(step, scores[:, :1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close([x[:1] for x in inner], extra["inner_states"], rtol=1e-4, atol=1e-5)


@translators
def test_given_embeddings(model_class, source):
    model = build(model_class)
    embedded = model.encoder.embed_tokens(source)
    expected = model.encoder(source)["encoder_out"]
    torch.testing.assert_close(model.encoder(source, token_embeddings=embedded)["encoder_out"], expected)
    other = model.encoder(source, token_embeddings=embedded.flip(2))["encoder_out"][0]
    assert (other - expected[0]).abs().max() > 1e-3


@translators
def test_forward_torchscript(model_class, source):
    model = build(model_class)
    lengths = torch.tensor([5, 9])
    found = model.encoder.forward_torchscript(
        {
            "src_tokens": source,
            "src_lengths": lengths,
            "prev_output_tokens": source,
            "return_all_hiddens": True,
        }
    )
    assert len(found["encoder_states"]) == 3


def test_scripted(source, target):
    model = build(LRNModel)
    scripted = torch.jit.script(model)
    expected, extra = model(source, None, target, return_all_hiddens=True)
    found, found_extra = scripted(source, None, target, return_all_hiddens=True)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found_extra["inner_states"], extra["inner_states"])
    assert scripted(source, None, target)[1]["inner_states"] == []
    assert len(scripted.encoder(source, None, True)["encoder_states"]) == 3
    with pytest.raises(torch.jit.Error, match="full_context_alignment must be False"):
        scripted.decoder(target, scripted.encoder(source), full_context_alignment=True)


@translators
def test_no_full_context(model_class, source, target):
    model = build(model_class)
    encoder_out = model.encoder(source)
    for call in (model.decoder, model.decoder.extract_features):
        with pytest.raises(ValueError, match="full_context_alignment must be False: a recurrent decoder"):
            call(target, encoder_out, full_context_alignment=True)
        call(target, encoder_out, full_context_alignment=False)


def test_the_language_model(target):
    model = LRNLanguageModel.build_model(
        LRNLanguageModelConfig(decoder_embed_dim=16, decoder_hidden_size=12, decoder_layers=2), task()
    ).eval()
    scores, extra = model(target)
    assert extra is None
    features, _ = model(target, features_only=True, src_lengths=torch.tensor([6, 4]))
    torch.testing.assert_close(model.decoder.output_layer(features), scores)
    torch.testing.assert_close(model.extract_features(target)[0], features)
    other, extra = model(target, return_all_hiddens=True)
    torch.testing.assert_close(other, scores)
    inner = extra["inner_states"]
    assert [tuple(x.shape) for x in inner] == [(6, 2, 16), (6, 2, 12), (6, 2, 12)]
    torch.testing.assert_close(model.decoder.project_out_dim(inner[-1]).transpose(0, 1), features)
    for name, value in (("full_context_alignment", True), ("alignment_layer", 0), ("alignment_heads", 1)):
        with pytest.raises(ValueError, match=f"{name}.* must be "):
            model(target, **{name: value})
