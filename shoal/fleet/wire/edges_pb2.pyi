from shoal.fleet.wire import fleet_pb2 as _fleet_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FetchRequest(_message.Message):
    __slots__ = ("credential", "hash", "offset")
    CREDENTIAL_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    credential: bytes
    hash: str
    offset: int
    def __init__(self, credential: _Optional[bytes] = ..., hash: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class Said(_message.Message):
    __slots__ = ("events",)
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    events: _containers.RepeatedCompositeFieldContainer[Event]
    def __init__(self, events: _Optional[_Iterable[_Union[Event, _Mapping]]] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("hello", "arrived", "left", "joined", "counted", "released", "away", "ask", "closed", "sums", "withdrawn", "admit", "heard")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ARRIVED_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    JOINED_FIELD_NUMBER: _ClassVar[int]
    COUNTED_FIELD_NUMBER: _ClassVar[int]
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    AWAY_FIELD_NUMBER: _ClassVar[int]
    ASK_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    SUMS_FIELD_NUMBER: _ClassVar[int]
    WITHDRAWN_FIELD_NUMBER: _ClassVar[int]
    ADMIT_FIELD_NUMBER: _ClassVar[int]
    HEARD_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    arrived: Arrived
    left: str
    joined: Joined
    counted: Counted
    released: bytes
    away: bytes
    ask: Ask
    closed: Closed
    sums: bytes
    withdrawn: Withdrawn
    admit: Admit
    heard: int
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., arrived: _Optional[_Union[Arrived, _Mapping]] = ..., left: _Optional[str] = ..., joined: _Optional[_Union[Joined, _Mapping]] = ..., counted: _Optional[_Union[Counted, _Mapping]] = ..., released: _Optional[bytes] = ..., away: _Optional[bytes] = ..., ask: _Optional[_Union[Ask, _Mapping]] = ..., closed: _Optional[_Union[Closed, _Mapping]] = ..., sums: _Optional[bytes] = ..., withdrawn: _Optional[_Union[Withdrawn, _Mapping]] = ..., admit: _Optional[_Union[Admit, _Mapping]] = ..., heard: _Optional[int] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("credential", "name", "address", "version")
    CREDENTIAL_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    credential: bytes
    name: str
    address: str
    version: int
    def __init__(self, credential: _Optional[bytes] = ..., name: _Optional[str] = ..., address: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class Arrived(_message.Message):
    __slots__ = ("devices",)
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    devices: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, devices: _Optional[_Iterable[str]] = ...) -> None: ...

class Joined(_message.Message):
    __slots__ = ("nonce", "version")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    version: int
    def __init__(self, nonce: _Optional[bytes] = ..., version: _Optional[int] = ...) -> None: ...

class Counted(_message.Message):
    __slots__ = ("nonce", "version", "staleness")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    version: int
    staleness: int
    def __init__(self, nonce: _Optional[bytes] = ..., version: _Optional[int] = ..., staleness: _Optional[int] = ...) -> None: ...

class Ask(_message.Message):
    __slots__ = ("number", "nonce")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    number: int
    nonce: bytes
    def __init__(self, number: _Optional[int] = ..., nonce: _Optional[bytes] = ...) -> None: ...

class Admit(_message.Message):
    __slots__ = ("number", "check_in")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    CHECK_IN_FIELD_NUMBER: _ClassVar[int]
    number: int
    check_in: _fleet_pb2.CheckIn
    def __init__(self, number: _Optional[int] = ..., check_in: _Optional[_Union[_fleet_pb2.CheckIn, _Mapping]] = ...) -> None: ...

class Withdrawn(_message.Message):
    __slots__ = ("nonce", "gone")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    GONE_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    gone: bool
    def __init__(self, nonce: _Optional[bytes] = ..., gone: _Optional[bool] = ...) -> None: ...

class Closed(_message.Message):
    __slots__ = ("groups", "error", "seen")
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    SEEN_FIELD_NUMBER: _ClassVar[int]
    groups: _containers.RepeatedCompositeFieldContainer[Group]
    error: str
    seen: str
    def __init__(self, groups: _Optional[_Iterable[_Union[Group, _Mapping]]] = ..., error: _Optional[str] = ..., seen: _Optional[str] = ...) -> None: ...

class Group(_message.Message):
    __slots__ = ("base_version", "members", "weight", "nonces", "expires_s", "costs")
    BASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    NONCES_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_S_FIELD_NUMBER: _ClassVar[int]
    COSTS_FIELD_NUMBER: _ClassVar[int]
    base_version: int
    members: int
    weight: int
    nonces: _containers.RepeatedScalarFieldContainer[bytes]
    expires_s: _containers.RepeatedScalarFieldContainer[float]
    costs: str
    def __init__(self, base_version: _Optional[int] = ..., members: _Optional[int] = ..., weight: _Optional[int] = ..., nonces: _Optional[_Iterable[bytes]] = ..., expires_s: _Optional[_Iterable[float]] = ..., costs: _Optional[str] = ...) -> None: ...

class Told(_message.Message):
    __slots__ = ("commands",)
    COMMANDS_FIELD_NUMBER: _ClassVar[int]
    commands: _containers.RepeatedCompositeFieldContainer[Command]
    def __init__(self, commands: _Optional[_Iterable[_Union[Command, _Mapping]]] = ...) -> None: ...

class Command(_message.Message):
    __slots__ = ("welcome", "open", "assign", "close", "stored", "committed", "failed", "finish", "answer", "withdraw", "dissolve", "send_away", "neighbours", "admitted")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    ASSIGN_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    WITHDRAW_FIELD_NUMBER: _ClassVar[int]
    DISSOLVE_FIELD_NUMBER: _ClassVar[int]
    SEND_AWAY_FIELD_NUMBER: _ClassVar[int]
    NEIGHBOURS_FIELD_NUMBER: _ClassVar[int]
    ADMITTED_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    open: Open
    assign: Assign
    close: bool
    stored: bool
    committed: int
    failed: str
    finish: str
    answer: Answer
    withdraw: bytes
    dissolve: str
    send_away: str
    neighbours: Neighbours
    admitted: Admitted
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., open: _Optional[_Union[Open, _Mapping]] = ..., assign: _Optional[_Union[Assign, _Mapping]] = ..., close: _Optional[bool] = ..., stored: _Optional[bool] = ..., committed: _Optional[int] = ..., failed: _Optional[str] = ..., finish: _Optional[str] = ..., answer: _Optional[_Union[Answer, _Mapping]] = ..., withdraw: _Optional[bytes] = ..., dissolve: _Optional[str] = ..., send_away: _Optional[str] = ..., neighbours: _Optional[_Union[Neighbours, _Mapping]] = ..., admitted: _Optional[_Union[Admitted, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("run", "plan", "token_key", "population", "wall_s", "asks")
    RUN_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    TOKEN_KEY_FIELD_NUMBER: _ClassVar[int]
    POPULATION_FIELD_NUMBER: _ClassVar[int]
    WALL_S_FIELD_NUMBER: _ClassVar[int]
    ASKS_FIELD_NUMBER: _ClassVar[int]
    run: str
    plan: str
    token_key: bytes
    population: str
    wall_s: float
    asks: bool
    def __init__(self, run: _Optional[str] = ..., plan: _Optional[str] = ..., token_key: _Optional[bytes] = ..., population: _Optional[str] = ..., wall_s: _Optional[float] = ..., asks: _Optional[bool] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("round", "base_version", "seed", "max_members", "reporting_window_s", "model", "taken")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    BASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MAX_MEMBERS_FIELD_NUMBER: _ClassVar[int]
    REPORTING_WINDOW_S_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TAKEN_FIELD_NUMBER: _ClassVar[int]
    round: int
    base_version: int
    seed: bytes
    max_members: int
    reporting_window_s: float
    model: str
    taken: _containers.RepeatedCompositeFieldContainer[Taken]
    def __init__(self, round: _Optional[int] = ..., base_version: _Optional[int] = ..., seed: _Optional[bytes] = ..., max_members: _Optional[int] = ..., reporting_window_s: _Optional[float] = ..., model: _Optional[str] = ..., taken: _Optional[_Iterable[_Union[Taken, _Mapping]]] = ...) -> None: ...

class Taken(_message.Message):
    __slots__ = ("version", "members")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    version: int
    members: int
    def __init__(self, version: _Optional[int] = ..., members: _Optional[int] = ...) -> None: ...

class Neighbours(_message.Message):
    __slots__ = ("addresses",)
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    addresses: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, addresses: _Optional[_Iterable[str]] = ...) -> None: ...

class Assign(_message.Message):
    __slots__ = ("device", "token")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    device: str
    token: _fleet_pb2.Token
    def __init__(self, device: _Optional[str] = ..., token: _Optional[_Union[_fleet_pb2.Token, _Mapping]] = ...) -> None: ...

class Admitted(_message.Message):
    __slots__ = ("number", "needs", "later")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    NEEDS_FIELD_NUMBER: _ClassVar[int]
    LATER_FIELD_NUMBER: _ClassVar[int]
    number: int
    needs: str
    later: str
    def __init__(self, number: _Optional[int] = ..., needs: _Optional[str] = ..., later: _Optional[str] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("number", "elsewhere", "state", "version", "has_version", "reason", "expires_s")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    ELSEWHERE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    HAS_VERSION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_S_FIELD_NUMBER: _ClassVar[int]
    number: int
    elsewhere: bool
    state: str
    version: int
    has_version: bool
    reason: str
    expires_s: float
    def __init__(self, number: _Optional[int] = ..., elsewhere: _Optional[bool] = ..., state: _Optional[str] = ..., version: _Optional[int] = ..., has_version: _Optional[bool] = ..., reason: _Optional[str] = ..., expires_s: _Optional[float] = ...) -> None: ...
