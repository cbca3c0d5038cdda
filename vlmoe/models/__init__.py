"""Models: the encoder that a recipe describes, its heads, and released checkpoints."""

from vlmoe.models.build import build_encoder, layer_ids, no_weight_decay
from vlmoe.models.convert import (
    beit3_from_state_dict,
    beit3_task_from_state_dict,
    beit3_task_to_state_dict,
    beit3_to_state_dict,
)
from vlmoe.models.encoder import Encoder, EncoderOutput
from vlmoe.models.heads import (
    CaptioningModel,
    ClassificationModel,
    NLVR2Model,
    PretrainModel,
    PretrainOutput,
    RetrievalModel,
    RetrievalOutput,
    TaskOutput,
    VQAModel,
)
from vlmoe.nn.embed import resize_positions

__all__ = [
    "CaptioningModel",
    "ClassificationModel",
    "Encoder",
    "EncoderOutput",
    "NLVR2Model",
    "PretrainModel",
    "PretrainOutput",
    "RetrievalModel",
    "RetrievalOutput",
    "TaskOutput",
    "VQAModel",
    "beit3_from_state_dict",
    "beit3_task_from_state_dict",
    "beit3_task_to_state_dict",
    "beit3_to_state_dict",
    "build_encoder",
    "layer_ids",
    "no_weight_decay",
    "resize_positions",
]
