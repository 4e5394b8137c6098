from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Advert(_message.Message):
    __slots__ = ("mask_key", "seal_key", "seed_digest", "identity_key", "certificate", "certified_until_s", "signature")
    MASK_KEY_FIELD_NUMBER: _ClassVar[int]
    SEAL_KEY_FIELD_NUMBER: _ClassVar[int]
    SEED_DIGEST_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_KEY_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    CERTIFIED_UNTIL_S_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    mask_key: bytes
    seal_key: bytes
    seed_digest: bytes
    identity_key: bytes
    certificate: bytes
    certified_until_s: float
    signature: bytes
    def __init__(self, mask_key: _Optional[bytes] = ..., seal_key: _Optional[bytes] = ..., seed_digest: _Optional[bytes] = ..., identity_key: _Optional[bytes] = ..., certificate: _Optional[bytes] = ..., certified_until_s: _Optional[float] = ..., signature: _Optional[bytes] = ...) -> None: ...

class NeighbourAdvert(_message.Message):
    __slots__ = ("number", "advert")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    ADVERT_FIELD_NUMBER: _ClassVar[int]
    number: int
    advert: Advert
    def __init__(self, number: _Optional[int] = ..., advert: _Optional[_Union[Advert, _Mapping]] = ...) -> None: ...

class Roster(_message.Message):
    __slots__ = ("number", "identities", "neighbours")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    IDENTITIES_FIELD_NUMBER: _ClassVar[int]
    NEIGHBOURS_FIELD_NUMBER: _ClassVar[int]
    number: int
    identities: bytes
    neighbours: _containers.RepeatedCompositeFieldContainer[NeighbourAdvert]
    def __init__(self, number: _Optional[int] = ..., identities: _Optional[bytes] = ..., neighbours: _Optional[_Iterable[_Union[NeighbourAdvert, _Mapping]]] = ...) -> None: ...

class Sealed(_message.Message):
    __slots__ = ("peer", "data")
    PEER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    peer: int
    data: bytes
    def __init__(self, peer: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class Shares(_message.Message):
    __slots__ = ("sealed",)
    SEALED_FIELD_NUMBER: _ClassVar[int]
    sealed: _containers.RepeatedCompositeFieldContainer[Sealed]
    def __init__(self, sealed: _Optional[_Iterable[_Union[Sealed, _Mapping]]] = ...) -> None: ...

class Survivors(_message.Message):
    __slots__ = ("bitmap",)
    BITMAP_FIELD_NUMBER: _ClassVar[int]
    bitmap: bytes
    def __init__(self, bitmap: _Optional[bytes] = ...) -> None: ...

class Signed(_message.Message):
    __slots__ = ("signature",)
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    signature: bytes
    def __init__(self, signature: _Optional[bytes] = ...) -> None: ...

class Agreement(_message.Message):
    __slots__ = ("signatures",)
    SIGNATURES_FIELD_NUMBER: _ClassVar[int]
    signatures: _containers.RepeatedCompositeFieldContainer[Signature]
    def __init__(self, signatures: _Optional[_Iterable[_Union[Signature, _Mapping]]] = ...) -> None: ...

class Signature(_message.Message):
    __slots__ = ("number", "signature", "certificate", "certified_until_s")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    CERTIFIED_UNTIL_S_FIELD_NUMBER: _ClassVar[int]
    number: int
    signature: bytes
    certificate: bytes
    certified_until_s: float
    def __init__(self, number: _Optional[int] = ..., signature: _Optional[bytes] = ..., certificate: _Optional[bytes] = ..., certified_until_s: _Optional[float] = ...) -> None: ...

class Revealed(_message.Message):
    __slots__ = ("of", "share")
    OF_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    of: int
    share: bytes
    def __init__(self, of: _Optional[int] = ..., share: _Optional[bytes] = ...) -> None: ...

class Unmask(_message.Message):
    __slots__ = ("revealed",)
    REVEALED_FIELD_NUMBER: _ClassVar[int]
    revealed: _containers.RepeatedCompositeFieldContainer[Revealed]
    def __init__(self, revealed: _Optional[_Iterable[_Union[Revealed, _Mapping]]] = ...) -> None: ...
