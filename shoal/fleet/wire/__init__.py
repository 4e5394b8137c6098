"""Generated from fleet.proto by scripts/protos."""
