"""What Xcode shows of a package."""

import json

import pytest

from rgexport import __version__
from rgexport.export.coreml.exporter import export_coreml
from rgexport.export.coreml.options import CoreMLOptions
from rgexport.export.coreml.package import model_file
from rgexport.export.opening import open_artifact
from rgexport.griffin.checkpoint import open_checkpoint
from tests.artifacts import export_random_coreml
from tests.models import make_config, random_weights, write_hugging_face

CONFIG = make_config("ra", width=32, heads=2, mlp_width=48, vocab_size=64)


def description(artifact):
    from coremltools.proto.Model_pb2 import Model

    model = Model()
    model.ParseFromString((artifact.path / model_file()).read_bytes())
    return model.description


def test_what_it_says_of_itself(exported):
    metadata = description(exported[0]).metadata
    assert metadata.shortDescription.startswith("model, a RecurrentGemma (Griffin) language model")
    assert (
        "int4 weights" in metadata.shortDescription and "prefill for 5" in metadata.shortDescription
    )
    assert metadata.author == "Unknown (exported by rgexport)"
    assert metadata.license == "That of the checkpoint it was made from"
    assert metadata.versionString == __version__
    own = metadata.userDefined
    assert own["rgexport.precision"] == "int4" and own["rgexport.compute"] == "fp16"
    assert json.loads(own["rgexport.config"]) == exported[0].manifest.config.to_dict()


@pytest.mark.parametrize(("precision", "state"), [("fp32", "hilo"), ("fp16", "io")])
def test_every_feature_is_explained(precision, state, tmp_path):
    artifact, _ = export_random_coreml(CONFIG, tmp_path, precision, recurrent_state=state)
    functions = description(artifact).functions
    assert len(functions) == 2
    for function in functions:
        features = [*function.input, *function.output, *function.state]
        assert len(features) >= 7
        texts = [feature.shortDescription for feature in features]
        assert all(texts) and len(set(texts)) == len(texts)
        assert not any("None" in text or "{" in text for text in texts)


def test_a_state_is_explained_with_its_layer(exported):
    help_of = {
        feature.name: feature.shortDescription
        for function in description(exported[0]).functions
        for feature in [*function.input, *function.output, *function.state]
    }
    assert help_of["layers_2_key"].startswith("Layer 2: the last 8 keys")
    assert help_of["layers_0_conv1d"].startswith("Layer 0: the last 3 inputs")
    assert "the last token" in help_of["logits"]
    assert "zeros at first" in help_of["recurrent_state"]


def test_released_models_carry_their_terms(tmp_path):
    model = tmp_path / "recurrentgemma-2b-it"
    write_hugging_face(CONFIG, random_weights(CONFIG), model)
    target = export_coreml(open_checkpoint(model), CoreMLOptions(), tmp_path / "out")
    metadata = description(open_artifact(target)).metadata
    assert metadata.author.startswith("Google") and "Gemma Terms of Use" in metadata.license
