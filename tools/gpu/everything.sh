#!/usr/bin/env bash
# Everything that only GPUs can show, on a bare machine of two; what came out lies in OUT.
#
#   PYTHONPATH=src:tests/support:SITE bash tools/gpu/everything.sh OUT PART...
#
# Parts, in this order on a fresh machine (minutes on two H200 and 32 cores): start (1), load (3), rows2 (4), tests2 (5), rows1 (5), rest (3).
# rows1 and rest use each GPU for work of its own. SITE holds what such a machine lacks: Ray, pyzmq, msgspec, gRPC's add-ons.
set -u

OUT=$1
shift
HALF=$(($(nproc) * 3 / 8))
QUIRE="python3 -P -m quire.cli.main"
export PYTHONUNBUFFERED=1 RAY_AUTH_MODE=disabled

mark() { echo "=== $(date +%T) $*"; }
one() { CUDA_VISIBLE_DEVICES=0 taskset -c "0-$((HALF - 1))" timeout "$@"; }
other() { CUDA_VISIBLE_DEVICES=1 taskset -c "$HALF-$(($(nproc) - 1))" timeout "$@"; }
engine() { echo "$QUIRE bench engine --dummy-weights --device cuda --max-model-len 16384 $*"; }

# Without the project's own settings, which name plugins that such a machine may lack.
printf '[pytest]\naddopts = --import-mode=importlib\nmarkers =\n  gpu\n  kernel\n  slow\n  chaos\n' >"$OUT/pytest.ini"
PYTEST="python3 -P -m pytest -q -p no:cacheprovider -c $OUT/pytest.ini --rootdir $PWD"

start() {
    timeout 120 python3 -P tools/gpu/start.py --out "$OUT/start.json" --turns 3
}

load() {
    timeout 360 python3 -P tools/gpu/two_gpus.py --out "$OUT/load.json" --parts load \
        --load-cases 64x128x256,256x128x256,256x128x256,256x128x256 >"$OUT/load.txt" 2>&1 || tail -c 2000 "$OUT/load.txt"
}

rows2() {
    timeout 140 $(engine --model-config llama-8b --tensor-parallel-size 2 --workload decode,prefill,mixed256,ttft) --json \
        2>&1 >"$OUT/tp2_8b.json" | tail -14
    timeout 200 $(engine --model-config llama-70b --tensor-parallel-size 2 --max-sequences 128 --workload decode) \
        --decode-cases 1x128,1x4096,32x1024,128x1024 --json 2>&1 >"$OUT/tp2_70b.json" | tail -6
}

tests2() {
    timeout 250 $PYTEST tests/worker/test_tensor_parallel_cuda.py -m gpu 2>&1 | tail -30
    timeout 200 python3 -P tools/gpu/two_gpus.py --out "$OUT/split.json" --parts groups,split 2>&1 | tail -c 900
    timeout 60 python3 -P tools/gpu/all_reduce.py --out "$OUT/all_reduce.json" >"$OUT/all_reduce.txt" 2>&1
    head -10 "$OUT/all_reduce.txt"
}

rows1() {
    (
        other 100 python3 -P tools/gpu/load.py --out "$OUT/weights.json" 2>&1 | tail -4
        other 400 python3 -P tools/gpu/swap.py --out "$OUT/swap.json" --models llama-13b --logs "$OUT/logs" 2>&1 | tail -5
    ) &
    one 330 python3 -P tools/gpu/table.py --out "$OUT/table.json" 2>&1 | tail -40
    wait
}

rest() {
    (
        other 300 python3 -P tools/gpu/correctness.py --out "$OUT/correctness.json" >"$OUT/correctness.txt" 2>&1
        mark "correctness $?"
        tail -c 1500 "$OUT/correctness.txt"
        other 120 $QUIRE bench kernels >"$OUT/kernels.txt" 2>&1
        grep paged "$OUT/kernels.txt"
    ) &
    one 60 $(engine --model-config llama-8b --workload gaps --log-folder "$OUT/gaps") 2>&1 | tail -4
    one 150 compute-sanitizer --tool memcheck --target-processes all env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        $PYTEST tests/kernels -m kernel >"$OUT/memcheck.txt" 2>&1
    tail -2 "$OUT/memcheck.txt"
    one 200 python3 -P tools/gpu/swap.py --out "$OUT/swap_small.json" --models qwen3-0.6b --logs "$OUT/logs" 2>&1 | tail -5
    wait
    tar -C "$OUT" -czf "$OUT/logs.tar.gz" logs gaps && rm -r "${OUT:?}/logs" "${OUT:?}/gaps"
}

for part in "$@"; do
    mark "$part"
    "$part"
done
mark end
