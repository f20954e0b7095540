#!/usr/bin/env bash
# Few-step students on the toy: what six LoRAs do in ten steps, one student does in four and in two.
#
#     bash experiments/few_steps.sh            # what is done is skipped; a run that was cut off goes on
#     SEEDS=0 bash experiments/few_steps.sh
#
# Runs go to out/few; few_steps.py then writes few_steps.md, few_steps.png and few_steps_samples.png here.
set -eu
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 R=out/few SEEDS="${SEEDS:-0 1 2}" TASKS="compose ocr scene blue green red"
mkdir -p $R

run() {  # run NAME COMMAND...: once
    local name=$1
    shift
    if [ ! -e $R/$name.done ]; then
        if ! "$@" --resume auto --out $R/$name > $R/$name.log 2>&1 \
            || grep -q "stopped (--resume" $R/$name.log; then
            echo "$name failed: see $R/$name.log"
            exit 255  # xargs starts no other
        fi
        touch $R/$name.done
        echo "$(date +%H:%M) $name"
    fi
}

files() {  # files SPLIT TASKS
    for t in ${2:-$TASKS}; do echo $t=toy/prompts/${t/scene/scene_dawn}_$1.txt; done
}
loras() {  # loras PREFIX: the six teachers, with PREFIX on a checkpoint of their own; compose is the hardest
    for t in $TASKS; do echo $t=${1-}toy/teachers/$t; done | sed '1s/$/,weight=2/'
}
guided() { sed 's/^\(compose\|ocr\)=[^,]*/&,guidance=1.5/'; }  # whom guidance helps
distill() { echo python distill.py --eval-prompts --reward --compare --eval-every 1000 --save-every 30 "$@"; }
student() { distill --num-steps 4 --teacher-substeps 4 --label-steps 0 --steps 60 "$@"; }
on() {  # on MODEL: the toy's settings for another base
    echo --model $1 --resolution 32 --guidance 1 --dtype float32 --prompts $(files train) \
        --lr 3e-3 --ema 0.6 --batch-size 48 --micro-batch-size 48
}

students() {  # students SEED
    run many-$1 $(distill --seed $1)
    start="--seed $1 --init $R/many-$1/lora"
    run four-$1 $(student $start)
    run two-$1 $(distill --seed $1 --init $R/four-$1/lora --num-steps 2 --teacher-substeps 5 --label-steps 0 \
        --steps 120)
    run guided-$1 $(student $start --teachers $(loras | guided) --prompts $(files train))
    run sft-$1 python cold_start.py sft $start --num-steps 4 --teacher-substeps 4 --steps 60 --lr 3e-3 \
        --ema 0.6 --save-every 30 --teachers $(loras) --prompts $(files train)
    # on a Turbo of the base, taught by LoRAs of the base
    run turbo-$1 $(student $start $(on $R/turbo) --teachers $(loras toy/base+))
}

# -- a Turbo of the base: a four-step student of the base alone, merged -------------------------------------
base_alone=$(for t in $TASKS; do echo $t=base; done | sed '1s/$/,weight=2/')
run turbobase $(student --init none --rank 16 --alpha 32 --teachers $base_alone --prompts $(files train))
if [ ! -e $R/turbo ]; then
    python sample.py --lora $R/turbobase/lora --merge $R/turbo --out $R/turbosamples > $R/turbo.log 2>&1
fi

# -- students, three seeds at once ---------------------------------------------------------------------------
export -f run files loras guided distill student on students
printf '%s\n' $SEEDS | xargs -P3 -I{} bash -euc 'students {}'

# -- pictures and scores -------------------------------------------------------------------------------------
each() { for name; do for s in $SEEDS; do echo $name$s=$R/$name-$s/lora; done; done; }  # each NAME...
evaluate() {  # evaluate FOLDER STEPS FLAGS...
    local out=$R/$1 steps=$2
    shift 2
    torchrun --nproc_per_node=2 evaluate.py --eval-num-steps $steps --out $out "$@" > $out.log 2>&1 \
        || { cat $out.log; exit 1; }
    echo "$(date +%H:%M) $out"
}
scores="--reward $(for t in $TASKS quality; do echo toy.$t; done)"
sum=$(for t in $TASKS; do echo +toy/teachers/$t; done | tr -d '\n')
for n in 1 2 3 4 6 10; do
    evaluate test-$n $n --tasks $(files test) $scores --models base sum=${sum#+} \
        $(each many four two sft guided)
    for t in $TASKS; do
        evaluate own-$n-$t $n --tasks $(files test $t) --reward toy.$t toy.quality --models $t=toy/teachers/$t
    done
done
for n in 2 4 10; do
    evaluate pairs-$n $n --tasks $(files val) --samples-per-prompt 2 --reward toy.quality \
        --models base $(each many four two sft guided)
done
evaluate turbo-4 4 $(on $R/turbo | sed 's/--prompts.*//') --tasks $(files test) $scores \
    --eval-batch-size 128 --models base $(each turbo many)
python experiments/few_steps.py
