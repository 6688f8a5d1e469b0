"""Make TensorBoard summaries of records, marked with the plugin's name."""

from __future__ import annotations

from tensorboard.compat.proto.summary_pb2 import (
    DATA_CLASS_BLOB_SEQUENCE,
    DATA_CLASS_TENSOR,
    Summary,
    SummaryMetadata,
)
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING

from vit.dashboard.format import PLUGIN, VERSION


def tensor_summary(tag: str, record: bytes) -> Summary:
    """Make a summary of one encoded record in a tensor series, which is read for all steps at once."""
    shape = TensorShapeProto()
    return _summary(tag, TensorProto(dtype=DT_STRING, tensor_shape=shape, string_val=[record]), DATA_CLASS_TENSOR)


def blob_summary(tag: str, record: bytes) -> Summary:
    """Make a summary of one encoded record as a blob sequence of one, which is fetched one step at a time."""
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    value = TensorProto(dtype=DT_STRING, tensor_shape=shape, string_val=[record])
    return _summary(tag, value, DATA_CLASS_BLOB_SEQUENCE)


def _summary(tag: str, value: TensorProto, data_class: int) -> Summary:
    content = b'{"v":%d}' % VERSION
    plugin = SummaryMetadata.PluginData(plugin_name=PLUGIN, content=content)
    # without a data class TensorBoard's fast loader keeps nothing
    metadata = SummaryMetadata(plugin_data=plugin, data_class=data_class)
    return Summary(value=[Summary.Value(tag=tag, tensor=value, metadata=metadata)])
