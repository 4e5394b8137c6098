from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class Report(_message.Message):
    __slots__ = ("schema", "day", "share", "sealed")
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    DAY_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    schema: bytes
    day: int
    share: bytes
    sealed: bytes
    def __init__(self, schema: _Optional[bytes] = ..., day: _Optional[int] = ..., share: _Optional[bytes] = ..., sealed: _Optional[bytes] = ...) -> None: ...

class Told(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Batch(_message.Message):
    __slots__ = ("schema", "day", "sealed")
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    DAY_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    schema: bytes
    day: int
    sealed: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, schema: _Optional[bytes] = ..., day: _Optional[int] = ..., sealed: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("masks", "noise", "bad")
    MASKS_FIELD_NUMBER: _ClassVar[int]
    NOISE_FIELD_NUMBER: _ClassVar[int]
    BAD_FIELD_NUMBER: _ClassVar[int]
    masks: bytes
    noise: float
    bad: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, masks: _Optional[bytes] = ..., noise: _Optional[float] = ..., bad: _Optional[_Iterable[int]] = ...) -> None: ...
