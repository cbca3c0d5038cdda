"""Shards, the order of their samples, and the batches that come of them. See docs/data.md."""

from vlmoe.data.batch import collate, to_device
from vlmoe.data.decode import Pixels
from vlmoe.data.examples import Examples, ExampleStream, open_examples
from vlmoe.data.loader import Batch, EvalLoader, build_eval_loader, build_loader
from vlmoe.data.masking import block_mask, text_mask
from vlmoe.data.readers import Example
from vlmoe.data.sample import BadSample, BadSampleCounter, BrokenSample, Sample, SamplePlace, SampleStream
from vlmoe.data.shards import Location, Stream, held_out_samples, open_held_out, open_streams
from vlmoe.data.text import Tokenizer, load_tokenizer
from vlmoe.data.transforms import eval_transform, to_float, train_transform

__all__ = [
    "BadSample",
    "BadSampleCounter",
    "Batch",
    "BrokenSample",
    "EvalLoader",
    "Example",
    "ExampleStream",
    "Examples",
    "Location",
    "Pixels",
    "Sample",
    "SamplePlace",
    "SampleStream",
    "Stream",
    "Tokenizer",
    "block_mask",
    "build_eval_loader",
    "build_loader",
    "collate",
    "eval_transform",
    "held_out_samples",
    "load_tokenizer",
    "open_examples",
    "open_held_out",
    "open_streams",
    "text_mask",
    "to_device",
    "to_float",
    "train_transform",
]
