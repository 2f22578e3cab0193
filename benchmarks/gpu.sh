#!/usr/bin/env bash
# Measure this machine's GPU: bash benchmarks/gpu.sh [--small] [--out FOLDER] [--seconds 450]
# Needs torch and transformers, and no network. Writes gpu.json and gpu.md into $OUT, if that is set, or into FOLDER.
set -euo pipefail
cd "$(dirname "$0")/.."
has_both="import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, ('torch', 'transformers'))))"
for python in ${PYTHON:-} .venv/bin/python python3 python; do
  if command -v "$python" > /dev/null && "$python" -c "$has_both"; then
    export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
    exec "$python" -m benchmarks.gpu "$@"
  fi
done
echo "no Python with torch and transformers here: name one, PYTHON=/path/to/python bash benchmarks/gpu.sh" >&2
exit 2
