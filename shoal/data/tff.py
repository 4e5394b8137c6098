"""SQLite files of federated data as TensorFlow Federated publishes them: users, and one `tf.train.Example` a row.

    client_metadata(client_id TEXT, split_name TEXT, num_examples INTEGER)
    examples(split_name TEXT, client_id TEXT, serialized_example_proto BLOB)        with an index on (split_name, client_id)

A user's rows are read when asked for, so a file of a hundred gigabytes takes the memory of its list of users and of one
user. The file is opened for reading alone, and a row of more than a megabyte is refused.

References:
    TensorFlow Federated, `simulation/datasets/sql_client_data.py` (the tables); TensorFlow, `core/example/feature.proto`
    (the message; only its wire format is used here).
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from shoal.errors import DataError

_MOST_ROW_BYTES = 1 << 20


@dataclass(frozen=True)
class Split:
    """One part (`train`, say) of a file."""

    path: Path
    name: str
    """The split's name in the file."""

    def sizes(self) -> dict[str, int]:
        """User -> number of rows, in order of name.

        Raises:
            DataError: no such file, another format, or no such split.
        """
        with _opened(self.path) as database:
            query = "SELECT client_id, num_examples FROM client_metadata WHERE split_name = ? ORDER BY client_id"
            found = {str(user): int(size) for user, size in database.execute(query, (self.name,))}
        if not found:
            raise DataError(f"{self.path} has no users in a split {self.name!r}.")
        return found

    def rows(self, user: str) -> Iterator[bytes]:
        """The serialized messages of a user, in the order of the file."""
        with _opened(self.path) as database:
            query = (
                "SELECT serialized_example_proto FROM examples WHERE split_name = ? AND client_id = ? ORDER BY rowid"
            )
            for (raw,) in database.execute(query, (self.name, user)):
                yield raw

    def features(self, user: str) -> Iterator["Features"]:
        """The messages of a user, read."""
        for number, raw in enumerate(self.rows(user)):
            try:
                yield Features(_message().FromString(raw), f"row {number} of user {user!r} in {self.path}")
            except Exception as error:  # protobuf's own DecodeError, or TypeError for what is no blob
                raise DataError(
                    f"Row {number} of user {user!r} in {self.path} is no tf.train.Example: {error}."
                ) from error


@dataclass(frozen=True)
class Features:
    """The features of one example, by name."""

    _made: Any
    _where: str

    def floats(self, name: str) -> list[float]:
        return list(self._of(name, "float_list"))

    def integer(self, name: str) -> int:
        return int(self._one(name, "int64_list"))

    def text(self, name: str) -> bytes:
        return bytes(self._one(name, "bytes_list"))

    def _one(self, name: str, kind: str) -> Any:
        values = self._of(name, kind)
        if len(values) != 1:
            raise DataError(f"Expected one value of {name!r} in {self._where}, got {len(values)}.")
        return values[0]

    def _of(self, name: str, kind: str) -> Any:
        features = self._made.features.feature
        if name not in features or features[name].WhichOneof("kind") != kind:
            raise DataError(
                f"Expected {name!r} as {kind} in {self._where}; it has {', '.join(sorted(features)) or 'none'}."
            )
        return getattr(features[name], kind).value


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    if not path.is_file():
        raise DataError(f"There is no file {path}.")
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as database:
            database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MOST_ROW_BYTES)
            database.execute("PRAGMA trusted_schema = OFF")
            yield database
    except sqlite3.Error as error:
        raise DataError(f"Cannot read {path} as federated data of TensorFlow Federated: {error}.") from error


@cache
def _message() -> Any:
    """The class of `Example { Features { map<string, Feature> } }`, made from its description."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="example", syntax="proto3")

    def message(name: str, into: Any = None) -> Any:
        return (into.nested_type if into is not None else file.message_type).add(name=name)

    def add(to: Any, name: str, number: int, kind: int, type_name: str = "", repeated: bool = False) -> Any:
        label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
        made = to.field.add(name=name, number=number, type=kind, label=label)
        if type_name:
            made.type_name = f".example.{type_name}"
        return made

    feature = message("Feature")
    feature.oneof_decl.add(name="kind")
    kinds = (
        ("Bytes", "bytes", field.TYPE_BYTES),
        ("Float", "float", field.TYPE_FLOAT),
        ("Int64", "int64", field.TYPE_INT64),
    )
    for number, (type_name, name, kind) in enumerate(kinds, start=1):
        add(message(f"{type_name}List"), "value", 1, kind, repeated=True)
        add(feature, f"{name}_list", number, field.TYPE_MESSAGE, f"{type_name}List").oneof_index = 0
    features = message("Features")
    entry = message("FeatureEntry", features)
    entry.options.map_entry = True
    add(entry, "key", 1, field.TYPE_STRING)
    add(entry, "value", 2, field.TYPE_MESSAGE, "Feature")
    add(features, "feature", 1, field.TYPE_MESSAGE, "Features.FeatureEntry", repeated=True)
    add(message("Example"), "features", 1, field.TYPE_MESSAGE, "Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("example.Example"))
