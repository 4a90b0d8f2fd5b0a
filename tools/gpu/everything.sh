#!/usr/bin/env bash
# Everything that only GPUs can show, on a bare machine; what came out lies in OUT.
#
#   PYTHONPATH=src:tests/support:SITE bash tools/gpu/everything.sh OUT PART...
#
# Parts, in this order on a fresh machine (seconds on H200s). One GPU: start (60), small (150), large (180), swap (275), tests (190), kernels (90),
# edge (200). Two GPUs: load (200), rows2 (230), tests2 (340). `beside` runs two parts of one GPU at once where there are two: beside large swap.
# SITE holds what such a machine lacks: Ray, pyzmq, msgspec, gRPC's add-ons. A command that fails does not end the run; it is named at the end
# with its exit code (124: it took too long), and the exit code is 1.
set -u

OUT=$1
shift
PARTS=" start small large swap tests kernels edge load rows2 tests2 beside "
for part in "$@"; do
    if [[ $PARTS != *" $part "* ]]; then
        echo "there is no part $part; there are$PARTS" >&2
        exit 2
    fi
done
NUM_GPUS=$(nvidia-smi --list-gpus | wc -l)
if [ "$NUM_GPUS" -eq 0 ]; then
    echo "nvidia-smi lists no GPU" >&2
    exit 1
fi
SHARE=$(($(nproc) / NUM_GPUS))
GPU=0
QUIRE="python3 -P -m quire.cli.main"
export PYTHONUNBUFFERED=1 RAY_AUTH_MODE=disabled

mark() { echo "=== $(date +%T) $*"; }
mkdir -p "$OUT" && : >"$OUT/failed" || exit 1
failed() { echo "$*" >>"$OUT/failed"; } # in a file, since pipes and `beside` are shells of their own
# SECONDS COMMAND...: on all GPUs, or on the part's own with its share of the cores.
everywhere() { timeout "$@" || failed "$? $*"; }
here() { CUDA_VISIBLE_DEVICES=$GPU taskset -c "$((GPU * SHARE))-$((GPU * SHARE + SHARE - 1))" timeout "$@" || failed "$? $*"; }
engine() { echo "$QUIRE bench engine --dummy-weights --device cuda --max-model-len 16384 $*"; }

# Without the project's own settings, which name plugins that such a machine may lack.
printf '[pytest]\naddopts = --import-mode=importlib\nmarkers =\n  gpu\n  kernel\n  slow\n  chaos\n' >"$OUT/pytest.ini"
PYTEST="python3 -P -m pytest -q -p no:cacheprovider -c $OUT/pytest.ini --rootdir $PWD"

beside() {
    if [ "$NUM_GPUS" -gt 1 ]; then
        (
            GPU=1
            "$2"
        ) &
    fi
    "$1"
    [ "$NUM_GPUS" -gt 1 ] || "$2"
    wait
}

start() { everywhere 120 python3 -P tools/gpu/start.py --out "$OUT/start.json" --turns 3; }

# A model whose steps take a millisecond of the host: nothing else may run beside it.
small() {
    here 150 python3 -P tools/gpu/table.py --out "$OUT/table_small.json" --models qwen3-0.6b 2>&1 | tail -20
    here 200 python3 -P tools/gpu/swap.py --out "$OUT/swap_small.json" --models qwen3-0.6b --logs "$OUT/logs" 2>&1 | tail -5
}

large() {
    here 300 python3 -P tools/gpu/table.py --out "$OUT/table.json" --models llama-8b 2>&1 | tail -20
    here 60 $(engine --model-config llama-8b --workload gaps --log-folder "$OUT/gaps") 2>&1 | tail -4
}

swap() {
    here 400 python3 -P tools/gpu/swap.py --out "$OUT/swap.json" --models llama-13b --logs "$OUT/logs" 2>&1 | tail -5
    here 100 python3 -P tools/gpu/load.py --out "$OUT/weights.json" 2>&1 | tail -4
}

tests() {
    here 500 python3 -P tools/gpu/correctness.py --out "$OUT/correctness.json" >"$OUT/correctness.txt" 2>&1
    tail -c 1500 "$OUT/correctness.txt"
    here 150 compute-sanitizer --tool memcheck --error-exitcode 1 --target-processes all env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        $PYTEST tests/kernels -m kernel >"$OUT/memcheck.txt" 2>&1
    tail -2 "$OUT/memcheck.txt"
}

kernels() {
    here 120 $QUIRE bench kernels >"$OUT/kernels.txt" 2>&1
    grep "paged\|rotary" "$OUT/kernels.txt"
    # Without -P: attention.py lies beside it.
    here 120 python3 tools/gpu/kernels.py --out "$OUT/layout.json" --only layout 2>&1 | tail -20
    here 60 python3 -P tools/gpu/dense_attention.py --out "$OUT/dense_attention.json"
}

edge() { edge_of 1; }
load() { edge_of 2; }
edge_of() {
    everywhere 400 python3 -P tools/gpu/two_gpus.py --out "$OUT/load$1.json" --parts load --tensor-parallel-size "$1" \
        --load-cases 64x128x256,256x128x256,256x128x256,256x128x256 >"$OUT/load$1.txt" 2>&1
    tail -c 500 "$OUT/load$1.txt"
}

rows2() {
    everywhere 140 $(engine --model-config llama-8b --tensor-parallel-size 2 --workload decode,prefill,mixed256,ttft) --json \
        2>&1 >"$OUT/tp2_8b.json" | tail -14
    everywhere 200 $(engine --model-config llama-70b --tensor-parallel-size 2 --max-sequences 128 --workload decode) \
        --decode-cases 1x128,1x4096,32x1024,128x1024 --json 2>&1 >"$OUT/tp2_70b.json" | tail -6
}

tests2() {
    everywhere 250 $PYTEST tests/worker/test_tensor_parallel_cuda.py -m gpu 2>&1 | tail -30
    everywhere 200 python3 -P tools/gpu/two_gpus.py --out "$OUT/split.json" --parts groups,split 2>&1 | tail -c 900
    everywhere 60 python3 -P tools/gpu/all_reduce.py --out "$OUT/all_reduce.json" >"$OUT/all_reduce.txt" 2>&1
    head -10 "$OUT/all_reduce.txt"
}

while [ $# -gt 0 ]; do
    if [ "$1" = beside ]; then
        mark "$2 beside $3"
        beside "$2" "$3"
        shift 2
    else
        mark "$1"
        "$1"
    fi
    shift
done
for folder in logs gaps; do
    if [ -d "$OUT/$folder" ]; then
        tar -C "$OUT" -czf "$OUT/$folder.tar.gz" "$folder" && rm -r "${OUT:?}/$folder" || failed "tar of $folder"
    fi
done
mark end
if [ -s "$OUT/failed" ]; then
    echo "failed:" && cat "$OUT/failed"
    exit 1
fi
