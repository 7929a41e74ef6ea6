"""The lrn model as PyTorch sees it; test_commands.py runs it through fairseq's commands."""

import argparse

import fairseq
import pytest
import torch
from batches import (
    DEVICES,
    SMALL,
    assert_batch_mates_do_not_matter,
    assert_beams_share_their_sentence,
    assert_left_padded_target_gives_the_same_scores,
    dictionary,
    sentences,
    task,
)
from fairseq import checkpoint_utils  # noqa: F401  (registers what models need)
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from fairseq.sequence_generator import SequenceGenerator

from fairseq_lrn.models import LRNModel
from fairseq_lrn.models.lrn import LRNConfig
from fairseq_lrn.modules import CELLS


def build(task_=None, device="cpu", **options):
    torch.manual_seed(0)
    config = LRNConfig(**{**SMALL, **options})
    return LRNModel.build_model(config, task_ or task()).to(device).eval()


def architecture(name):
    args = argparse.Namespace()
    ARCH_CONFIG_REGISTRY[name](args)
    return LRNConfig.from_namespace(args)


@pytest.mark.parametrize("name", ["lrn", "lrn_iwslt_de_en"])
def test_defaults_are_those_of_fairseqs_transformer(name):
    theirs = argparse.Namespace()
    ARCH_CONFIG_REGISTRY["transformer_iwslt_de_en"](theirs)
    ours = vars(architecture(name))
    shared = set(ours) & set(vars(theirs)) - {"_name"}
    assert len(shared) > 15
    assert {k: ours[k] for k in shared} == {k: getattr(theirs, k) for k in shared}


def test_wmt_architecture_has_the_transformers_sizes():
    theirs = argparse.Namespace()
    ARCH_CONFIG_REGISTRY["transformer_wmt_en_de"](theirs)
    ours = vars(architecture("lrn_wmt_en_de"))
    shared = set(ours) & set(vars(theirs)) - {"_name"}
    assert {k: ours[k] for k in shared} == {k: getattr(theirs, k) for k in shared}


@pytest.mark.parametrize("name", ["iwslt_de_en", "wmt_en_de"])
def test_olrn_architectures_differ_in_the_cell_only(name):
    lrn, olrn = vars(architecture(f"lrn_{name}")), vars(architecture(f"olrn_{name}"))
    assert {k for k in lrn if lrn[k] != olrn[k]} == {"cell"}


def test_architecture_keeps_what_the_user_set():
    args = argparse.Namespace(encoder_layers=3)
    ARCH_CONFIG_REGISTRY["lrn_tiny"](args)
    assert (args.encoder_layers, args.decoder_layers) == (3, 4)


@pytest.mark.skipif(
    fairseq.__version__ == "0.12.2", reason="its Transformer keeps encoder weights that training does not use"
)
def test_tiny_is_within_a_tenth_of_the_small_transformers_parameters():
    def parameters(name, args):
        args.share_all_embeddings = True
        ARCH_CONFIG_REGISTRY[name](args)
        model = ARCH_MODEL_REGISTRY[name].build_model(args, task(dictionary(8000)))
        return sum(parameter.numel() for parameter in model.parameters())

    sizes = {"layers": 4, "embed_dim": 128, "ffn_embed_dim": 256, "attention_heads": 4}
    theirs = argparse.Namespace(**{f"{s}_{k}": v for s in ("encoder", "decoder") for k, v in sizes.items()})
    ratio = parameters("lrn_tiny", argparse.Namespace()) / parameters("transformer_iwslt_de_en", theirs)
    assert 0.9 < ratio < 1.1


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_batch_mates_do_not_matter(device, left, cell):
    """Encoding and scores of a sentence are the same alone and beside longer ones, padded on either side."""
    model = build(device=device, cell=cell)
    assert_batch_mates_do_not_matter(model, left)


def calls_of_first_layer(model):
    """Steps and sentences of each call of the decoder's first layer, from now on."""
    found = []
    model.decoder.layers[0].register_forward_pre_hook(lambda _, args: found.append(tuple(args[0].shape[:2])))
    return found


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("device", DEVICES)
def test_training_decodes_short_and_long_sentences_apart(device, cell):
    model = build(device=device, cell=cell, dropout=0.0)
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([4] * 60 + [3] * 10 + [50] * 20)[torch.randperm(90, generator=generator)].tolist()
    pad = model.encoder.padding_idx
    source = sentences([n // 2 + 1 for n in lengths], pad).to(device)
    target = sentences(lengths, pad, seed=2).to(device)
    found = calls_of_first_layer(model)
    features, gradients = [], []
    for training in (False, True):
        model.train(training)
        y, extra = model(source, None, target, features_only=True)
        assert y.shape == (90, 50, 16)
        y = y[target.ne(pad)]
        model.zero_grad()
        y.square().sum().backward()
        features.append(y)
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    split = [(50, 90), (4, 70), (50, 20)] if device == "cpu" else [(50, 90)] * 2
    assert found == split and extra["attn"] == [None]
    torch.testing.assert_close(features[1], features[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


def test_batch_is_split_only_where_that_saves_padding():
    model = build(dropout=0.0).train()
    pad = model.encoder.padding_idx
    found = calls_of_first_layer(model)

    def calls(lengths, left=False, more=0, **options):
        found.clear()
        target = torch.nn.functional.pad(sentences(lengths, pad, left), (0, more), value=pad)
        y, _ = model(sentences([3] * len(lengths), pad), None, target, **options)
        assert y.shape[:2] == target.shape
        return found.copy()

    short_and_long = [4] * 70 + [50] * 20
    assert calls(short_and_long) == [(4, 70), (50, 20)]
    assert calls([50] * 89 + [49]) == [(50, 90)]  # saves one position
    assert calls([4] * 7 + [50] * 2) == [(50, 9)]  # takes no time anyway
    assert calls(short_and_long, left=True) == [(50, 90)]
    assert calls([30] * 90, more=50) == [(30, 90)]  # as --required-seq-len-multiple pads
    assert calls(short_and_long, return_all_hiddens=True) == [(50, 90)]
    model.decoder.learns_alignments = True
    assert calls(short_and_long) == [(50, 90)]
    for options in ({"checkpoint_activations": True}, {"compile": True}, {"quant_noise_pq": 0.1}):
        assert not build(**options).decoder.splits


def test_subclass_sees_the_whole_batch():
    class Doubled(type(build().decoder)):
        def extract_features(self, *args, **kwargs):
            x, extra = super().extract_features(*args, **kwargs)
            return 2 * x, extra

    model = build(dropout=0.0)
    pad = model.encoder.padding_idx
    lengths = [4] * 70 + [50] * 20
    source, target = sentences([3] * 90, pad), sentences(lengths, pad)
    expected = 2 * model(source, None, target, features_only=True)[0]
    model.decoder.__class__ = Doubled
    found = calls_of_first_layer(model)
    y, _ = model.train()(source, None, target, features_only=True)
    assert len(found) == 2
    torch.testing.assert_close(y[target.ne(pad)], expected[target.ne(pad)])


def test_left_padded_target_gives_the_same_scores():
    assert_left_padded_target_gives_the_same_scores(build())


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("device", DEVICES)
def test_incremental_decoding_equals_teacher_forcing(device, cell):
    model = build(device=device, cell=cell)
    pad = model.encoder.padding_idx
    source = sentences([5, 9, 2], pad, left=True).to(device)
    target = sentences([8, 8, 8], pad, seed=2).to(device)
    scores, extra = model(source, None, target)
    encoder_out, state = model.encoder(source), {}
    for t in range(target.size(1)):
        step, step_extra = model.decoder(target[:, : t + 1], encoder_out, incremental_state=state)
        torch.testing.assert_close(step[:, 0], scores[:, t], rtol=0, atol=1e-5)
        torch.testing.assert_close(step_extra["attn"][0][:, 0], extra["attn"][0][:, t], rtol=0, atol=1e-5)


def test_states_follow_the_beam():
    """After a reordering, every hypothesis goes on from the state of the one it was made from."""
    model = build()
    pad = model.encoder.padding_idx
    source = sentences([5, 9, 2], pad)
    target = sentences([6, 6, 6], pad, seed=2)
    order = torch.tensor([2, 0])
    encoder_out, state = model.encoder(source), {}
    for t in range(3):
        model.decoder(target[:, : t + 1], encoder_out, incremental_state=state)
    model.decoder.reorder_incremental_state_scripting(state, order)
    encoder_out = model.encoder.reorder_encoder_out(encoder_out, order)
    step, _ = model.decoder(target[order, :4], encoder_out, incremental_state=state)
    whole, _ = model(source[order], None, target[order, :4])
    torch.testing.assert_close(step[:, 0], whole[:, 3], rtol=0, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_beams_share_their_sentence(device):
    assert_beams_share_their_sentence(build(device=device))


@pytest.mark.parametrize("device", DEVICES)
def test_every_hypothesis_of_a_beam_scores_as_teacher_forcing_does(device):
    """Through reorderings, finished hypotheses and sentences that leave the batch at different times."""
    model = build(device=device)
    lengths = torch.tensor([7, 3, 11, 5])
    source = sentences(lengths.tolist(), model.encoder.padding_idx, left=True).to(device)
    with torch.no_grad():  # </s> like what is looked for on average, so that sentences end early
        features, _ = model(source, None, source, features_only=True)
        model.decoder.output_projection.weight[2] = features.mean((0, 1)) / 2
        model.decoder.output_projection.weight.mul_(4)
    generator = SequenceGenerator([model], task().target_dictionary, beam_size=4, max_len_b=12)
    found = generator.generate(
        [model], {"net_input": {"src_tokens": source, "src_lengths": lengths.to(device)}}
    )
    assert len({len(hypothesis["tokens"]) for beam in found for hypothesis in beam}) > 1
    for i, beam in enumerate(found):
        for hypothesis in beam:
            tokens = hypothesis["tokens"].unsqueeze(0)
            previous = torch.cat([torch.full_like(tokens[:, :1], 2), tokens[:, :-1]], 1)
            scores = model(source[i : i + 1], None, previous)[0].log_softmax(-1)
            expected = scores.gather(2, tokens.unsqueeze(2))[0, :, 0]
            torch.testing.assert_close(hypothesis["positional_scores"], expected, rtol=0, atol=2e-5)


def test_state_is_one_vector_a_layer():
    model = build()
    source = sentences([5, 9], model.encoder.padding_idx)
    state = {}
    model.decoder(source[:, :1], model.encoder(source), incremental_state=state)
    saved = model.decoder.get_incremental_state(state, "states")
    shapes = {k: tuple(v.shape) for k, v in saved.items()}
    assert shapes == {"states": (2, 2, 16), "keys_values": (2, 2, 2, 2, 9, 8)}


def test_attention_is_averaged_over_heads():
    model = build()
    source = sentences([5, 9], model.encoder.padding_idx)
    attn = model(source, None, source)[1]["attn"][0]
    assert attn.shape == (2, 9, 9)
    torch.testing.assert_close(attn.sum(-1), torch.ones(2, 9))
    assert (attn[0, :, 5:] == 0).all()
    heads = [model(source, None, source, alignment_heads=n)[1]["attn"][0] for n in (1, 2)]
    torch.testing.assert_close(heads[1], attn)
    assert not torch.allclose(heads[0], attn)
    first = model(source, None, source, alignment_layer=0)[1]["attn"][0]
    assert first.shape == attn.shape and not torch.allclose(first, attn)


def test_embeddings_are_shared_as_asked():
    apart = build()
    tied = build(share_decoder_input_output_embed=True)
    joined = build(share_all_embeddings=True)
    assert apart.encoder.embed_tokens is not apart.decoder.embed_tokens
    assert apart.decoder.output_projection.weight is not apart.decoder.embed_tokens.weight
    assert tied.decoder.output_projection.weight is tied.decoder.embed_tokens.weight
    assert tied.encoder.embed_tokens is not tied.decoder.embed_tokens
    assert joined.encoder.embed_tokens is joined.decoder.embed_tokens
    assert joined.decoder.output_projection.weight is joined.decoder.embed_tokens.weight


def test_pretrained_embeddings_are_loaded(tmp_path):
    for side, value in (("encoder", 1.5), ("decoder", -2.5)):
        (tmp_path / side).write_text(f"1 16\nw3 {' '.join([str(value)] * 16)}\n")
    model = build(encoder_embed_path=str(tmp_path / "encoder"), decoder_embed_path=str(tmp_path / "decoder"))
    row = dictionary().index("w3")
    assert (model.encoder.embed_tokens.weight[row] == 1.5).all()
    assert (model.decoder.embed_tokens.weight[row] == -2.5).all()
    assert not (model.encoder.embed_tokens.weight[row + 1] == 1.5).any()


def test_encoder_and_decoder_may_differ_in_width():
    model = build(encoder_embed_dim=12)
    source = sentences([5, 9], model.encoder.padding_idx)
    assert model(source, None, source)[0].shape == (2, 9, 54)


def test_adaptive_softmax_gives_a_distribution():
    model = build(adaptive_softmax_cutoff=[10, 30])
    source = sentences([5, 9], model.encoder.padding_idx)
    out = model(source, None, source)
    probs = model.decoder.get_normalized_probs(out, log_probs=False, sample=None)
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 9))


def test_every_parameter_learns():
    model = build().train()
    source = sentences([5, 9], model.encoder.padding_idx)
    model(source, None, source)[0].logsumexp(-1).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_word_dropout_drops_whole_words_in_place_of_elements():
    model = build(dropout=0.9, word_dropout=0.5).train()
    seen = []
    for part in (model.encoder, model.decoder):
        part.dropout_module.register_forward_hook(
            lambda module, inputs, output: seen.append((*inputs, output))
        )
    pad = model.encoder.padding_idx
    model(sentences([40, 40], pad), None, sentences([30, 30], pad, seed=2))
    assert [tuple(before.shape[:2]) for before, _ in seen] == [(40, 2), (30, 2)]
    for before, after in seen:
        dropped = (after == 0).all(2)
        assert 0 < dropped.sum() < dropped.numel()
        torch.testing.assert_close(after[~dropped], 2 * before[~dropped])


@pytest.mark.parametrize(
    "given, cell, used", [(None, "lrn", "identity"), (None, "olrn", "identity"), ("tanh", "lrn", "tanh")]
)
def test_activation_is_the_papers_unless_given(given, cell, used):
    model = build(cell=cell, cell_activation=given)
    layers = [*model.encoder.layers, *model.decoder.layers]
    assert {layer.rnn.activation for layer in layers} == {used}


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(encoder_layers=0), "--encoder-layers is 0, but must be positive"),
        (dict(decoder_ffn_embed_dim=-4), "--decoder-ffn-embed-dim is -4, but must be positive"),
        (dict(cell="gru", cell_activation="identity"), "identity is for lrn and olrn, but --cell is gru"),
        (dict(decoder_attention_heads=3), "must be a multiple of --decoder-attention-heads, 3"),
        (dict(share_all_embeddings=True, encoder_embed_dim=12), "--encoder-embed-dim .12. to match"),
        (
            dict(share_all_embeddings=True, encoder_embed_path="a", decoder_embed_path="b"),
            "not compatible with another --decoder-embed-path",
        ),
    ],
)
def test_what_cannot_be_built_is_said(options, words):
    with pytest.raises(ValueError, match=words):
        build(**options)


def test_embeddings_of_different_dictionaries_cannot_be_shared():
    with pytest.raises(ValueError, match="requires a joined dictionary"):
        build(task(dictionary(), dictionary(first="v")), share_all_embeddings=True)


def test_attention_in_bfloat16():
    """On the CPU by PyTorch's products: as float32's, forward and backward."""
    attention = build().decoder.layers[0].encoder_attn
    torch.manual_seed(0)
    x, memory = torch.randn(5, 6, 16), torch.randn(7, 3, 16)
    padding_mask = torch.arange(7) >= torch.tensor([[7], [4], [2]])
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        attention.to(dtype)
        inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in (x, memory)]
        y, weights = attention(inputs[0], attention.project(inputs[1]), padding_mask, False)
        assert weights is None and y.dtype == dtype
        y.float().square().sum().backward()
        results.append([y.float(), *(tensor.grad.float() for tensor in inputs)])
    for wide, narrow in zip(*results):
        torch.testing.assert_close(narrow, wide, rtol=0, atol=0.03 * float(wide.abs().max()))


def test_compiled_layers_train_as_others():
    """One graph a kind of layer, whatever the batches' shapes; nothing that fairseq saves tells of it."""
    torch._dynamo.reset()
    saved = argparse.Namespace(**SMALL, dropout=0.0, compile=True)
    compiled = LRNModel.build_model(LRNConfig.from_namespace(saved), task())
    assert saved.compile is False
    plain = build(dropout=0.0).train()
    assert list(compiled.state_dict()) == list(plain.state_dict())
    compiled.load_state_dict(plain.state_dict())
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    for layer in [*compiled.encoder.layers, *compiled.decoder.layers]:
        assert layer._compiled_call_impl is not None
        layer.compile(dynamic=True, fullgraph=True, backend=backend)
    pad = plain.encoder.padding_idx
    for lengths in ([5, 9, 2], [4, 4], [7, 3, 6, 2]):  # the second without padding
        source, target = sentences(lengths, pad, left=True), sentences(lengths[::-1], pad, seed=2)
        results = []
        for model in (plain, compiled):
            model.zero_grad()
            scores, _ = model(source, None, target)
            scores.logsumexp(2).sum().backward()
            results.append([scores, *(parameter.grad for parameter in model.parameters())])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    # an encoder's layer and a decoder's; PyTorch 2.4 knows layers apart
    assert len(graphs) == (2 if torch.__version__ >= "2.5" else 4)


@pytest.mark.parametrize(
    "options",
    [{"checkpoint_activations": True}, {"offload_activations": True}, {"cell": "gru"}, {"cell": "sru"}],
)
def test_what_cannot_be_compiled_is_refused(options):
    with pytest.raises(ValueError, match="--compile is"):
        build(compile=True, **options)


def test_what_fairseq_saves_of_a_yaml_file_does_not_compile():
    from fairseq.models import build_model
    from omegaconf import OmegaConf

    whole = OmegaConf.create({"model": {**SMALL, "_name": "lrn", "compile": True}})
    model = build_model(whole.model, task())
    assert model.encoder.layers[0]._compiled_call_impl is not None
    assert whole.model.compile is False
