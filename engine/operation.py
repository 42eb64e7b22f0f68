"""What a layer tells the pipeline about itself: it is an `Operation` that mainly uses one `Resource`.

Models are made of Operations and plain arithmetic; the tracer of the nano-batch pipeline treats an Operation as a
leaf. Nothing here knows about streams, nano-batches or ranks.
"""

from enum import StrEnum
from typing import ClassVar

from torch import nn


class Resource(StrEnum):
    """The part of the device that bounds an operation (NanoFlow, section 3.1)."""

    COMPUTE = "compute"
    MEMORY = "memory"
    NETWORK = "network"


class Operation(nn.Module):
    """A leaf of the operation graph; subclasses name the resource that bounds them."""

    resource: ClassVar[Resource]
