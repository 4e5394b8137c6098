from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RuntimeInfo(_message.Message):
    __slots__ = ("kind", "version", "calling_convention", "platforms")
    KIND_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CALLING_CONVENTION_FIELD_NUMBER: _ClassVar[int]
    PLATFORMS_FIELD_NUMBER: _ClassVar[int]
    kind: str
    version: _containers.RepeatedScalarFieldContainer[int]
    calling_convention: int
    platforms: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, kind: _Optional[str] = ..., version: _Optional[_Iterable[int]] = ..., calling_convention: _Optional[int] = ..., platforms: _Optional[_Iterable[str]] = ...) -> None: ...

class CheckIn(_message.Message):
    __slots__ = ("population", "tasks", "device_id", "runtime", "software", "codecs", "memory_bytes", "held", "device_class", "credential", "stay", "unfit")
    POPULATION_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    RUNTIME_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    DEVICE_CLASS_FIELD_NUMBER: _ClassVar[int]
    CREDENTIAL_FIELD_NUMBER: _ClassVar[int]
    STAY_FIELD_NUMBER: _ClassVar[int]
    UNFIT_FIELD_NUMBER: _ClassVar[int]
    population: str
    tasks: _containers.RepeatedScalarFieldContainer[str]
    device_id: str
    runtime: RuntimeInfo
    software: str
    codecs: _containers.RepeatedScalarFieldContainer[str]
    memory_bytes: int
    held: _containers.RepeatedScalarFieldContainer[str]
    device_class: str
    credential: bytes
    stay: bool
    unfit: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, population: _Optional[str] = ..., tasks: _Optional[_Iterable[str]] = ..., device_id: _Optional[str] = ..., runtime: _Optional[_Union[RuntimeInfo, _Mapping]] = ..., software: _Optional[str] = ..., codecs: _Optional[_Iterable[str]] = ..., memory_bytes: _Optional[int] = ..., held: _Optional[_Iterable[str]] = ..., device_class: _Optional[str] = ..., credential: _Optional[bytes] = ..., stay: _Optional[bool] = ..., unfit: _Optional[_Iterable[str]] = ...) -> None: ...

class Token(_message.Message):
    __slots__ = ("signed", "signature")
    SIGNED_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    signed: bytes
    signature: bytes
    def __init__(self, signed: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Assignment(_message.Message):
    __slots__ = ("population", "run", "task", "base_version", "nonce", "expires_s", "round", "edge", "plan", "model", "configuration")
    POPULATION_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    BASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_S_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    EDGE_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CONFIGURATION_FIELD_NUMBER: _ClassVar[int]
    population: str
    run: str
    task: str
    base_version: int
    nonce: bytes
    expires_s: float
    round: int
    edge: str
    plan: str
    model: str
    configuration: bytes
    def __init__(self, population: _Optional[str] = ..., run: _Optional[str] = ..., task: _Optional[str] = ..., base_version: _Optional[int] = ..., nonce: _Optional[bytes] = ..., expires_s: _Optional[float] = ..., round: _Optional[int] = ..., edge: _Optional[str] = ..., plan: _Optional[str] = ..., model: _Optional[str] = ..., configuration: _Optional[bytes] = ...) -> None: ...

class Fixed(_message.Message):
    __slots__ = ("bits", "exponent", "bound", "max_weight", "max_members")
    BITS_FIELD_NUMBER: _ClassVar[int]
    EXPONENT_FIELD_NUMBER: _ClassVar[int]
    BOUND_FIELD_NUMBER: _ClassVar[int]
    MAX_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    MAX_MEMBERS_FIELD_NUMBER: _ClassVar[int]
    bits: int
    exponent: int
    bound: float
    max_weight: int
    max_members: int
    def __init__(self, bits: _Optional[int] = ..., exponent: _Optional[int] = ..., bound: _Optional[float] = ..., max_weight: _Optional[int] = ..., max_members: _Optional[int] = ...) -> None: ...

class RoundConfiguration(_message.Message):
    __slots__ = ("round", "base_version", "seed", "fixed", "reporting_window_s", "clip_norm", "keys", "codec_down", "codec_up", "send_order")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    BASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    FIXED_FIELD_NUMBER: _ClassVar[int]
    REPORTING_WINDOW_S_FIELD_NUMBER: _ClassVar[int]
    CLIP_NORM_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    CODEC_DOWN_FIELD_NUMBER: _ClassVar[int]
    CODEC_UP_FIELD_NUMBER: _ClassVar[int]
    SEND_ORDER_FIELD_NUMBER: _ClassVar[int]
    round: int
    base_version: int
    seed: bytes
    fixed: _containers.RepeatedCompositeFieldContainer[Fixed]
    reporting_window_s: float
    clip_norm: float
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    codec_down: str
    codec_up: str
    send_order: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, round: _Optional[int] = ..., base_version: _Optional[int] = ..., seed: _Optional[bytes] = ..., fixed: _Optional[_Iterable[_Union[Fixed, _Mapping]]] = ..., reporting_window_s: _Optional[float] = ..., clip_norm: _Optional[float] = ..., keys: _Optional[_Iterable[bytes]] = ..., codec_down: _Optional[str] = ..., codec_up: _Optional[str] = ..., send_order: _Optional[_Iterable[int]] = ...) -> None: ...

class Blob(_message.Message):
    __slots__ = ("hash", "data")
    HASH_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    hash: str
    data: bytes
    def __init__(self, hash: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class Assigned(_message.Message):
    __slots__ = ("token", "configuration", "plan", "plan_signature", "plan_public_key", "model", "inline", "group", "run", "expires_s", "server_time_s")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    CONFIGURATION_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    PLAN_SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    PLAN_PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    INLINE_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_S_FIELD_NUMBER: _ClassVar[int]
    SERVER_TIME_S_FIELD_NUMBER: _ClassVar[int]
    token: Token
    configuration: RoundConfiguration
    plan: str
    plan_signature: bytes
    plan_public_key: bytes
    model: str
    inline: _containers.RepeatedCompositeFieldContainer[Blob]
    group: str
    run: str
    expires_s: float
    server_time_s: float
    def __init__(self, token: _Optional[_Union[Token, _Mapping]] = ..., configuration: _Optional[_Union[RoundConfiguration, _Mapping]] = ..., plan: _Optional[str] = ..., plan_signature: _Optional[bytes] = ..., plan_public_key: _Optional[bytes] = ..., model: _Optional[str] = ..., inline: _Optional[_Iterable[_Union[Blob, _Mapping]]] = ..., group: _Optional[str] = ..., run: _Optional[str] = ..., expires_s: _Optional[float] = ..., server_time_s: _Optional[float] = ...) -> None: ...

class Later(_message.Message):
    __slots__ = ("delay_min_s", "delay_max_s", "why", "other_edge")
    DELAY_MIN_S_FIELD_NUMBER: _ClassVar[int]
    DELAY_MAX_S_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    OTHER_EDGE_FIELD_NUMBER: _ClassVar[int]
    delay_min_s: float
    delay_max_s: float
    why: str
    other_edge: str
    def __init__(self, delay_min_s: _Optional[float] = ..., delay_max_s: _Optional[float] = ..., why: _Optional[str] = ..., other_edge: _Optional[str] = ...) -> None: ...

class Incompatible(_message.Message):
    __slots__ = ("needs", "runtimes")
    NEEDS_FIELD_NUMBER: _ClassVar[int]
    RUNTIMES_FIELD_NUMBER: _ClassVar[int]
    needs: str
    runtimes: _containers.RepeatedCompositeFieldContainer[RuntimeInfo]
    def __init__(self, needs: _Optional[str] = ..., runtimes: _Optional[_Iterable[_Union[RuntimeInfo, _Mapping]]] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("why",)
    WHY_FIELD_NUMBER: _ClassVar[int]
    why: str
    def __init__(self, why: _Optional[str] = ...) -> None: ...

class Report(_message.Message):
    __slots__ = ("token", "root", "weight", "slices", "costs")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    SLICES_FIELD_NUMBER: _ClassVar[int]
    COSTS_FIELD_NUMBER: _ClassVar[int]
    token: Token
    root: str
    weight: int
    slices: _containers.RepeatedCompositeFieldContainer[PushSlice]
    costs: Costs
    def __init__(self, token: _Optional[_Union[Token, _Mapping]] = ..., root: _Optional[str] = ..., weight: _Optional[int] = ..., slices: _Optional[_Iterable[_Union[PushSlice, _Mapping]]] = ..., costs: _Optional[_Union[Costs, _Mapping]] = ...) -> None: ...

class Costs(_message.Message):
    __slots__ = ("compute_s", "compile_s", "data_s", "wait_s", "wire_s", "padding", "joules", "steps", "examples")
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    COMPILE_S_FIELD_NUMBER: _ClassVar[int]
    DATA_S_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    WIRE_S_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    JOULES_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    compute_s: float
    compile_s: float
    data_s: float
    wait_s: float
    wire_s: float
    padding: float
    joules: float
    steps: int
    examples: int
    def __init__(self, compute_s: _Optional[float] = ..., compile_s: _Optional[float] = ..., data_s: _Optional[float] = ..., wait_s: _Optional[float] = ..., wire_s: _Optional[float] = ..., padding: _Optional[float] = ..., joules: _Optional[float] = ..., steps: _Optional[int] = ..., examples: _Optional[int] = ...) -> None: ...

class Counted(_message.Message):
    __slots__ = ("version", "token", "delay_min_s", "delay_max_s")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    DELAY_MIN_S_FIELD_NUMBER: _ClassVar[int]
    DELAY_MAX_S_FIELD_NUMBER: _ClassVar[int]
    version: int
    token: Token
    delay_min_s: float
    delay_max_s: float
    def __init__(self, version: _Optional[int] = ..., token: _Optional[_Union[Token, _Mapping]] = ..., delay_min_s: _Optional[float] = ..., delay_max_s: _Optional[float] = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ("reason", "detail", "token", "delay_min_s", "delay_max_s")
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    DELAY_MIN_S_FIELD_NUMBER: _ClassVar[int]
    DELAY_MAX_S_FIELD_NUMBER: _ClassVar[int]
    reason: str
    detail: str
    token: Token
    delay_min_s: float
    delay_max_s: float
    def __init__(self, reason: _Optional[str] = ..., detail: _Optional[str] = ..., token: _Optional[_Union[Token, _Mapping]] = ..., delay_min_s: _Optional[float] = ..., delay_max_s: _Optional[float] = ...) -> None: ...

class Released(_message.Message):
    __slots__ = ("why", "token", "delay_min_s", "delay_max_s")
    WHY_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    DELAY_MIN_S_FIELD_NUMBER: _ClassVar[int]
    DELAY_MAX_S_FIELD_NUMBER: _ClassVar[int]
    why: str
    token: Token
    delay_min_s: float
    delay_max_s: float
    def __init__(self, why: _Optional[str] = ..., token: _Optional[_Union[Token, _Mapping]] = ..., delay_min_s: _Optional[float] = ..., delay_max_s: _Optional[float] = ...) -> None: ...

class Incomplete(_message.Message):
    __slots__ = ("token", "missing")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    token: Token
    missing: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, token: _Optional[_Union[Token, _Mapping]] = ..., missing: _Optional[_Iterable[str]] = ...) -> None: ...

class GroupMessage(_message.Message):
    __slots__ = ("token", "phase", "data")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    token: Token
    phase: str
    data: bytes
    def __init__(self, token: _Optional[_Union[Token, _Mapping]] = ..., phase: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class GaveUp(_message.Message):
    __slots__ = ("token", "stage", "why")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    token: Token
    stage: str
    why: str
    def __init__(self, token: _Optional[_Union[Token, _Mapping]] = ..., stage: _Optional[str] = ..., why: _Optional[str] = ...) -> None: ...

class Ping(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FromDevice(_message.Message):
    __slots__ = ("check_in", "report", "gave_up", "group", "ping")
    CHECK_IN_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    GAVE_UP_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    check_in: CheckIn
    report: Report
    gave_up: GaveUp
    group: GroupMessage
    ping: Ping
    def __init__(self, check_in: _Optional[_Union[CheckIn, _Mapping]] = ..., report: _Optional[_Union[Report, _Mapping]] = ..., gave_up: _Optional[_Union[GaveUp, _Mapping]] = ..., group: _Optional[_Union[GroupMessage, _Mapping]] = ..., ping: _Optional[_Union[Ping, _Mapping]] = ...) -> None: ...

class FromEdge(_message.Message):
    __slots__ = ("assigned", "later", "incompatible", "counted", "refused", "released", "incomplete", "finished", "group", "ping")
    ASSIGNED_FIELD_NUMBER: _ClassVar[int]
    LATER_FIELD_NUMBER: _ClassVar[int]
    INCOMPATIBLE_FIELD_NUMBER: _ClassVar[int]
    COUNTED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    INCOMPLETE_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    assigned: Assigned
    later: Later
    incompatible: Incompatible
    counted: Counted
    refused: Refused
    released: Released
    incomplete: Incomplete
    finished: Finished
    group: GroupMessage
    ping: Ping
    def __init__(self, assigned: _Optional[_Union[Assigned, _Mapping]] = ..., later: _Optional[_Union[Later, _Mapping]] = ..., incompatible: _Optional[_Union[Incompatible, _Mapping]] = ..., counted: _Optional[_Union[Counted, _Mapping]] = ..., refused: _Optional[_Union[Refused, _Mapping]] = ..., released: _Optional[_Union[Released, _Mapping]] = ..., incomplete: _Optional[_Union[Incomplete, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ..., group: _Optional[_Union[GroupMessage, _Mapping]] = ..., ping: _Optional[_Union[Ping, _Mapping]] = ...) -> None: ...

class PullRequest(_message.Message):
    __slots__ = ("token", "hash", "offset", "credit", "ids", "packed", "base", "then")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    PACKED_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    THEN_FIELD_NUMBER: _ClassVar[int]
    token: Token
    hash: str
    offset: int
    credit: int
    ids: _containers.RepeatedScalarFieldContainer[int]
    packed: bool
    base: str
    then: _containers.RepeatedCompositeFieldContainer[Wanted]
    def __init__(self, token: _Optional[_Union[Token, _Mapping]] = ..., hash: _Optional[str] = ..., offset: _Optional[int] = ..., credit: _Optional[int] = ..., ids: _Optional[_Iterable[int]] = ..., packed: _Optional[bool] = ..., base: _Optional[str] = ..., then: _Optional[_Iterable[_Union[Wanted, _Mapping]]] = ...) -> None: ...

class Wanted(_message.Message):
    __slots__ = ("hash", "base")
    HASH_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    hash: str
    base: str
    def __init__(self, hash: _Optional[str] = ..., base: _Optional[str] = ...) -> None: ...

class Slice(_message.Message):
    __slots__ = ("offset", "data", "total", "unpacked", "is_delta")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    UNPACKED_FIELD_NUMBER: _ClassVar[int]
    IS_DELTA_FIELD_NUMBER: _ClassVar[int]
    offset: int
    data: bytes
    total: int
    unpacked: int
    is_delta: bool
    def __init__(self, offset: _Optional[int] = ..., data: _Optional[bytes] = ..., total: _Optional[int] = ..., unpacked: _Optional[int] = ..., is_delta: _Optional[bool] = ...) -> None: ...

class PushSlice(_message.Message):
    __slots__ = ("token", "tensor", "offset", "data", "root", "unpacked")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    UNPACKED_FIELD_NUMBER: _ClassVar[int]
    token: Token
    tensor: str
    offset: int
    data: bytes
    root: str
    unpacked: int
    def __init__(self, token: _Optional[_Union[Token, _Mapping]] = ..., tensor: _Optional[str] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ..., root: _Optional[str] = ..., unpacked: _Optional[int] = ...) -> None: ...

class PushReply(_message.Message):
    __slots__ = ("received", "credit")
    class ReceivedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    received: _containers.ScalarMap[str, int]
    credit: int
    def __init__(self, received: _Optional[_Mapping[str, int]] = ..., credit: _Optional[int] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ("token",)
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    token: Token
    def __init__(self, token: _Optional[_Union[Token, _Mapping]] = ...) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("state", "version", "reason", "received")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNKNOWN: _ClassVar[StatusReply.State]
        PENDING: _ClassVar[StatusReply.State]
        COUNTED: _ClassVar[StatusReply.State]
        REFUSED: _ClassVar[StatusReply.State]
        EXPIRED: _ClassVar[StatusReply.State]
    UNKNOWN: StatusReply.State
    PENDING: StatusReply.State
    COUNTED: StatusReply.State
    REFUSED: StatusReply.State
    EXPIRED: StatusReply.State
    class ReceivedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    STATE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    state: StatusReply.State
    version: int
    reason: str
    received: _containers.ScalarMap[str, int]
    def __init__(self, state: _Optional[_Union[StatusReply.State, str]] = ..., version: _Optional[int] = ..., reason: _Optional[str] = ..., received: _Optional[_Mapping[str, int]] = ...) -> None: ...
