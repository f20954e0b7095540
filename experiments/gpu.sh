#!/usr/bin/env bash
# Eleven minutes of one GPU: is everything right on it, and what does an update of SD3.5-Medium's architecture
# (random weights) cost? Each part has its own time limit; what it printed and its figures lie in out/gpu.
#
#     bash experiments/gpu.sh                        # needs 62 GB, the recipe `released` 102; OUT=DIR
#     MODEL=tiny-random bash experiments/gpu.sh      # a try, also without a GPU
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/gpu}
MODEL=${MODEL:-sd35m-random}
dtype=float16
size="--resolution 512 --num-steps 10 --batch-size 8 --micro-batch-size 8 --updates 2"
tiny=""
if [ $MODEL = tiny-random ]; then
    dtype=float32
    size="--resolution 32 --num-steps 3 --batch-size 2 --micro-batch-size 2 --updates 1"
    tiny="--steps 1 --eval-prompts --reward"
    export TORCH_COMPILE_DISABLE=1
fi
bench="python experiments/bench.py --model $OUT/base --guidance 4.5 --dtype $dtype $size"
mkdir -p $OUT
rm -rf $OUT/toy  # of an earlier try

part() {  # part NAME SECONDS COMMAND...
    local name=$1 most=$2
    shift 2
    timeout -k 5 $most "$@" > $OUT/$name.txt 2>&1
    local status=$?
    echo "=== $name: exit status $status, at second $SECONDS"
    tr '\r' '\n' < $OUT/$name.txt | tail -${LINES_SHOWN:-25} | cut -c1-200
}

part card 60 python -c "
import accelerate, diffusers, peft, torch, transformers
for library in (torch, diffusers, transformers, peft, accelerate):
    print(library.__name__, library.__version__)
print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU')"
part checks 200 python -m pytest -q -n 6 -p no:cacheprovider tests/test_cuda.py &  # these three at once
part toy 200 python distill.py --out $OUT/toy $tiny &
part model 100 python -c "
import torch
from experiments import meter
meter.random_pipeline('$OUT/base', torch.$dtype, False, *meter.SIZES['$MODEL'])" &
wait
part report 270 $bench --gpu-report --out $OUT/report.json
part recipes 290 $bench --recipe ours two-pass released --out $OUT/recipes.json
part teacher 60 $bench --script train_teacher.py --out $OUT/teacher.json
rm -rf $OUT/base
