"""What stands on a disk: `.tw` files, files of any kind, `.safetensors` files, what is in them, and whose they are."""

from tensorwire.files.any import decode_file, encode_file
from tensorwire.files.tw import TensorFile, iterate_file, load_file, save_file

__all__ = ["TensorFile", "decode_file", "encode_file", "iterate_file", "load_file", "save_file"]
