"""A trained model as plain files that need neither the run nor its libraries: ``load`` opens such a folder.

Loading takes jax, flax, numpy, scipy and safetensors; pillow, av and soundfile are loaded when files of their kind are
given. No code from the files is run.
"""

from pipeline.export.config import read_config
from pipeline.export.encoder import Encoder
from pipeline.export.folder import check_new, save_model
from pipeline.export.loading import load, load_model

__all__ = ["Encoder", "check_new", "load", "load_model", "read_config", "save_model"]
