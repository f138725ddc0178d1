#!/usr/bin/env bash
# All GPU benchmarks, from the project's root, in about ten minutes; no network is needed. Figures are added to
# benchmarks/results/gpu_*.jsonl. With --tiny, a check on a CPU that takes a minute and records nothing. The last part
# needs Ray and is skipped without it.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python -m benchmarks.gpu.steps "$@"
python -m benchmarks.gpu.captioning "$@"
if [ "${1:-}" != --tiny ] && python -c 'import ray' 2>/dev/null; then
  time python -m cluster run --size small run.name=gpu cluster.gpus_per_worker=1 cluster.extract_workers=1
fi
