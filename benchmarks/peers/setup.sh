#!/bin/sh
# Installs one rival of a benchmark into an environment of its own, beside the repository's: setup.sh NAME [FOLDER].
# The benchmarks look for it in $SHOAL_PEERS, by default ~/.cache/shoal/peers.
set -eu
name=${1:?"usage: setup.sh lmdb | rocksdict | mtkahypar | libcachesim | pfl | flwr | fedjax | torch | torchft [FOLDER]"}
folder=${2:-${SHOAL_PEERS:-$HOME/.cache/shoal/peers}}
case "$name" in
  lmdb) pinned="lmdb>=1.6 numpy>=2.1" ;;
  rocksdict) pinned="rocksdict>=0.3.25 numpy>=2.1" ;;
  mtkahypar) pinned="mtkahypar>=1.7 numpy>=2.1" ;;
  libcachesim) pinned="libcachesim>=0.3.5 numpy>=2.1" ;;
  pfl) pinned="pfl==0.6.0 torch==2.13.0 numpy==2.4.6" ;;
  flwr) pinned="flwr[simulation]==1.41.0 ray==2.55.1 torch==2.13.0 numpy==2.4.6" ;;
  torch) pinned="torch==2.13.0 numpy==2.4.6" ;;
  torchft) pinned="torchft==0.2.0 torch==2.13.0 numpy==2.4.6" ;;
  # FedJAX needs what JAX no longer has (jax.tree_map): the last JAX it runs on unchanged.
  fedjax) pinned="fedjax==0.0.17 jax==0.4.30 jaxlib==0.4.30 dm-haiku==0.0.12 optax==0.2.3 chex==0.1.86 scipy==1.13.1 numpy==1.26.4" ;;
  *) echo "setup.sh: expected lmdb, rocksdict, mtkahypar, libcachesim, pfl, flwr, fedjax, torch or torchft, got $name" >&2; exit 2 ;;
esac
"${PYTHON:-python3}" -m venv "$folder/$name"
# shellcheck disable=SC2086
"$folder/$name/bin/python" -m pip install --quiet --disable-pip-version-check $pinned
echo "$folder/$name"
