#!/bin/sh
# Installs one rival of a benchmark into an environment of its own, beside the repository's: setup.sh NAME [FOLDER].
# The benchmarks look for it in $SHOAL_PEERS, by default ~/.cache/shoal/peers.
set -eu
name=${1:?"usage: setup.sh lmdb | rocksdict | mtkahypar | libcachesim [FOLDER]"}
folder=${2:-${SHOAL_PEERS:-$HOME/.cache/shoal/peers}}
case "$name" in
  lmdb) pinned="lmdb>=1.6 numpy>=2.1" ;;
  rocksdict) pinned="rocksdict>=0.3.25 numpy>=2.1" ;;
  mtkahypar) pinned="mtkahypar>=1.7 numpy>=2.1" ;;
  libcachesim) pinned="libcachesim>=0.3.5 numpy>=2.1" ;;
  *) echo "setup.sh: expected lmdb, rocksdict, mtkahypar or libcachesim, got $name" >&2; exit 2 ;;
esac
python3 -m venv "$folder/$name"
# shellcheck disable=SC2086
"$folder/$name/bin/python" -m pip install --quiet --disable-pip-version-check $pinned
echo "$folder/$name"
