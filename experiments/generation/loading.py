"""Finds and loads checkpoints and adapters: folders, data sets, packages, the hub."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections

import lorax
from experiments.data import tokenization
from experiments.data.sources import paths
from experiments.generation import quantizing
from experiments.machine import placement
from lorax import checkpoint
from lorax.interop import hf, peft, sources
from lorax.quantized import FORMATS
from lorax.types import Adapters


def load_model(
    source: str, quantize: str = "", **kwargs: Any
) -> tuple[Any, Any, tokenization.Tokenizer]:
    """Returns the model, its parameters and its tokenizer (bytes for vision models).

    Args:
      source: a checkpoint in the folder of data sets, a directory, a GGUF file, either
        of these in a package, "package:NAME/PATH", or a hub id.
      quantize: as `config.model.quantize`, see `quantizing.rules`.
      **kwargs: for `lorax.interop.hf.load`, or `lorax.interop.gguf.load`.

    Raises:
      ValueError: among other things, the tokenizer has ids that the model lacks.
    """
    path = find(source)
    model, params = read(path, quantize, **kwargs)
    if not hasattr(model.config, "vocabulary"):
        return model, params, tokenization.ByteTokenizer()
    tokenizer = tokenization.load(path)
    vocabulary = model.config.vocabulary
    where = path.name if tokenization.is_gguf(path) else "config.json"
    tokenization.require_vocabulary(tokenizer, vocabulary, where)
    return model, params, tokenizer


def read(path: pathlib.Path, quantize: str = "", **kwargs: Any) -> tuple[Any, Any]:
    """Returns the model and the parameters in a directory or a GGUF file.

    Raises:
      ValueError: among other things, `quantize="file"` for a directory, which has no
        codes to keep.
    """
    rules: Any = quantizing.rules(quantize) or None
    if tokenization.is_gguf(path):
        from lorax.interop import gguf  # an extra

        kept = quantize == quantizing.OF_FILE
        return gguf.load(path, quantize=quantize if kept else rules, **kwargs)
    if quantize == quantizing.OF_FILE:
        raise ValueError(
            f"quantize={quantize!r} keeps the codes of a GGUF file, but {path} is "
            f"a directory; give a format: {', '.join(FORMATS)}"
        )
    return hf.load(path, quantize=rules, **kwargs)


def load_base(
    config: ml_collections.ConfigDict,
    key: jax.Array,
    place: placement.Place = placement.ALONE,
    *,
    dense: bool = False,
) -> tuple[Any, Any, tokenization.Tokenizer]:
    """Returns the model, its parameters and its tokenizer.

    Args:
      config: `config.model`. `source` is as for `load_model`; if `random` is not empty,
        its fields are the config.json of a randomly initialised model, which reads
        bytes.
      key: initialises that model, or a head that the checkpoint lacks.
      place: where the parameters go.
      dense: ignores `config.quantize`.
    """
    quantize = "" if dense else config.quantize
    switches = {"labels": config.labels, "head": "classification"}
    switches = switches if config.labels else {}
    if config.head:
        switches |= {"head": config.head}
    switches |= switches_of(config)
    if config.random:
        fields = config.random.to_dict()
        model = hf.configured(fields, "config.model.random", **switches)
        tokens = hf.example(model)

        def draw(key: jax.Array) -> Any:
            return model.init(key, *tokens)["params"]

        placed = place.params(model, shapes := jax.eval_shape(draw, key))
        where = placed.tree(shapes) if placed else None
        params = jax.jit(draw, out_shardings=where)(key)
        params = quantizing.quantized(model, params, quantize)
        return model, params, tokenization.ByteTokenizer()

    def shardings(model: Any, shapes: Any) -> Any:
        placed = place.params(model, shapes)
        return placed.tree(shapes) if placed else None

    if not tokenization.is_gguf(config.source):
        switches |= {"key": key}
    elif config.labels:
        raise ValueError(
            f"config.model.labels={config.labels}: a model in a GGUF file has no "
            "classification head; give the checkpoint of an encoder"
        )
    return load_model(
        config.source,
        quantize,
        dtype=config.dtype or None,
        shardings=shardings,
        **switches,
    )


def switches_of(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns the switches of `config.model` that affect how it computes, not what.

    Switches that only some families have are included only if they are set.
    """
    switches = {"scan": config.scan, "remat": config.remat}
    if config.attention != "plain":
        switches["attention"] = config.attention
    if config.dispatch:
        switches["dispatch"] = config.dispatch
    return switches


def find(source: str, files: Sequence[str] = hf.HUB_FILES) -> pathlib.Path:
    """Returns the directory or the GGUF file of a checkpoint.

    Args:
      source: as for `load_model`.
      files: patterns of the files to download for a hub id.
    """
    if tokenization.is_gguf(source):
        return _file(source)
    return hf.locate(source, folders=(paths.root(),), files=files)


def check(source: str) -> None:
    """Raises FileNotFoundError for a mistyped local name; hub ids are not checked."""
    if tokenization.is_gguf(source):
        _file(source)
    else:
        hf.find_local(source, (paths.root(),))


def _file(source: str) -> pathlib.Path:
    """Returns a GGUF file by its name, which is never looked up on the hub."""
    if source.startswith(sources.PACKAGE):
        return sources.in_package(source, file=True)
    given = pathlib.Path(source).expanduser()
    places = (paths.root() / given, given)
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        near = sorted({p.name for place in places for p in place.parent.glob("*.gguf")})
        told = f"; beside it: {', '.join(near[:8])}" if near else ""
        raise FileNotFoundError(f"the file {source} does not exist{told}")
    return found


def load_adapters(folder: str, model: Any, params: Any) -> tuple[Adapters, Any]:
    """Returns the adapters in a folder, lorax's own or PEFT's, and their base.

    Args:
      folder: of the adapters.
      model: the model that they adapt.
      params: the plain parameters; returned as a `lorax.Base` if the adapters have
        frozen arrays.
    """
    if (pathlib.Path(folder) / "adapter_config.json").exists():
        return peft.load_with_base(folder, model.config, params)
    frozen = checkpoint.load_frozen(folder)
    base = lorax.Base(params, frozen) if frozen else params
    return checkpoint.load_adapters(folder, params=base), base
