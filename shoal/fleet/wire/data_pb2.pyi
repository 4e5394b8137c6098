from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class OfferRequest(_message.Message):
    __slots__ = ("ticket", "population")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    POPULATION_FIELD_NUMBER: _ClassVar[int]
    ticket: bytes
    population: str
    def __init__(self, ticket: _Optional[bytes] = ..., population: _Optional[str] = ...) -> None: ...

class OfferReply(_message.Message):
    __slots__ = ("manifest", "signature", "key")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    manifest: bytes
    signature: bytes
    key: bytes
    def __init__(self, manifest: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., key: _Optional[bytes] = ...) -> None: ...

class ClaimRequest(_message.Message):
    __slots__ = ("ticket", "taker", "root", "room_bytes")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    TAKER_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    ROOM_BYTES_FIELD_NUMBER: _ClassVar[int]
    ticket: bytes
    taker: bytes
    root: bytes
    room_bytes: int
    def __init__(self, ticket: _Optional[bytes] = ..., taker: _Optional[bytes] = ..., root: _Optional[bytes] = ..., room_bytes: _Optional[int] = ...) -> None: ...

class ClaimReply(_message.Message):
    __slots__ = ("shard", "wait_s", "done", "too_large", "held")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOO_LARGE_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    shard: int
    wait_s: float
    done: bool
    too_large: bool
    held: int
    def __init__(self, shard: _Optional[int] = ..., wait_s: _Optional[float] = ..., done: _Optional[bool] = ..., too_large: _Optional[bool] = ..., held: _Optional[int] = ...) -> None: ...

class PullRequest(_message.Message):
    __slots__ = ("ticket", "taker", "root", "shard", "offset")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    TAKER_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    ticket: bytes
    taker: bytes
    root: bytes
    shard: int
    offset: int
    def __init__(self, ticket: _Optional[bytes] = ..., taker: _Optional[bytes] = ..., root: _Optional[bytes] = ..., shard: _Optional[int] = ..., offset: _Optional[int] = ...) -> None: ...

class Piece(_message.Message):
    __slots__ = ("offset", "data")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    offset: int
    data: bytes
    def __init__(self, offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class HeldRequest(_message.Message):
    __slots__ = ("ticket", "taker", "root", "shard")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    TAKER_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    ticket: bytes
    taker: bytes
    root: bytes
    shard: int
    def __init__(self, ticket: _Optional[bytes] = ..., taker: _Optional[bytes] = ..., root: _Optional[bytes] = ..., shard: _Optional[int] = ...) -> None: ...

class HeldReply(_message.Message):
    __slots__ = ("other", "held")
    OTHER_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    other: bool
    held: int
    def __init__(self, other: _Optional[bool] = ..., held: _Optional[int] = ...) -> None: ...
