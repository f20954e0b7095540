#!/usr/bin/env bash
# The paper's experiments in miniature, from the shipped base to the tables and figures beside this file:
# plain commands of this repository's scripts, two at a time, one thread each. What is done already is
# skipped, and what was killed goes on where it was.
#
#     bash experiments/reproduce.sh     # two CPU cores; runs and pictures go to out/reproduce
#     SEEDS="0 1" bash experiments/reproduce.sh     # seed 0 is always needed
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
# Freed memory is kept for the next layer, not given back to the system.
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=2147483647
R=out/reproduce
ALL="compose ocr scene"
SEEDS=${SEEDS:-0 1 2}
started=""
mkdir -p $R
rm -f $R/failed

# -- the queue ---------------------------------------------------------------------------------------------

fail() {  # fail NAME: not before the other run has ended
    echo "$1 failed, see $R/$1.log"
    wait
    exit 1
}

pause() {
    sleep 0.2
    if [ -s $R/failed ]; then
        fail "$(cat $R/failed)"
    fi
}

run() {  # run NAME COMMAND...: in the background, two at a time, each name once
    local name=$1
    shift
    if [ -e $R/$name.done ] || [[ " $started " == *" $name "* ]]; then
        return
    fi
    started+=" $name"
    while (( $(jobs -rp | wc -l) >= 2 )); do
        pause
    done
    echo "$(date +%H:%M) $name"
    {
        if "$@" --out $R/$name --resume auto > $R/$name.log 2>&1 \
            && ! grep -q "stopped (--resume" $R/$name.log; then
            touch $R/$name.done
        else
            echo $name > $R/failed
        fi
    } &
}

need() {  # need NAME...: wait until these runs are done
    local name
    for name; do
        while [ ! -e $R/$name.done ]; do
            pause
        done
    done
}

evaluate() {  # evaluate FOLDER FLAGS...: with both cores; it skips by itself what it has
    local out=$1
    shift
    torchrun --nproc_per_node=2 evaluate.py --out $R/$out "$@" > $R/$out.log 2>&1 || fail $out
    echo "$(date +%H:%M) evaluated: $out"
}

# -- flags of several runs ---------------------------------------------------------------------------------

files() { for t in $1; do echo $t=toy/prompts/${t}_$2.txt; done; }           # files TASKS SPLIT
loras() { for name; do echo $name=$R/$name/lora; done; }                     # loras NAME...
every_seed() { for name; do for s in $SEEDS; do echo $name-$s; done; done; }   # every_seed ARM...
twice() { sed 's/\(compose=[^ ]*\)/\1,weight=2/'; }                          # compose is the hardest
guided() { sed 's/\(compose\|ocr\)=[^ ]*lora/&,guidance=1.5/g'; }             # whom guidance helps: (f)

teachers() {  # teachers TASKS [SEED [OPTIONS]]
    local t
    for t in $1; do
        echo $t=$R/$t-${2:-0}/lora${3:-}
    done | twice
}

grpo() {  # grpo TASKS
    echo python train_teacher.py --prompts $(files "$1" train | twice) --eval-prompts $(files "$1" val) \
        --reward $(printf 'toy.%s ' $1) --save-every 4 --eval-every 4
}

sft() {
    echo python cold_start.py sft --teachers $(teachers "$ALL") --prompts $(files "$ALL" train) --steps 24 \
        --batch-size 32 --micro-batch-size 32 --ema 0.5 --save-every 4
}

distill() {  # distill TASKS [SEED [OPTIONS]]: its teachers'; no table at the end
    echo python distill.py --teachers $(teachers "$@") --prompts $(files "$1" train) --eval-prompts --reward \
        --batch-size 32 --micro-batch-size 32 --ema 0.5 --eval-every 1000 --save-every 4 --keep 100
}

# -- stage 1: teachers -------------------------------------------------------------------------------------
# A rollout is 16 prompts x 16 pictures and 4 updates for the hard task and what it takes part in, else half.

small="--batch-size 8 --updates-per-rollout 2 --lr 3e-3"
large="--batch-size 16 --updates-per-rollout 4 --lr 2e-3"
run compose-0 $(grpo compose) $large --steps 32
run ocr-0 $(grpo ocr) $small --steps 16
run scene-0 $(grpo scene) $small --steps 12
# MAR's anchor: one reward on everybody's prompts
run quality-0 $(grpo "$ALL") $small --reward toy.quality --eval-every 8 --steps 8

for s in $SEEDS; do
    # GRPO on three, two and one of the rewards, with as many pictures and updates as their teachers together;
    # the single ones show how much a teacher owes to its seed
    run mix-$s $(grpo "$ALL") $large --eval-every 23 --steps 46 --seed $s
    run stack2-$s $(grpo "ocr scene") $small --eval-every 7 --steps 28 --seed $s
    run compose-$s $(grpo compose) $large --steps 32 --seed $s
    run ocr-$s $(grpo ocr) $small --steps 16 --seed $s
    run scene-$s $(grpo scene) $small --steps 12 --seed $s
    need compose-0 ocr-0 scene-0 quality-0

    # stage 2: cold starts
    run merge python cold_start.py merge --teachers $(teachers "$ALL")
    run sft-$s $(sft) --seed $s
    run sft-kl-$s $(sft) --seed $s --weighting kl
    need merge

    # stage 3: Flow-OPD, from every start, and GRPO-Mix from the same starts with as many pictures: 5 rollouts
    # of 256, 40 updates of 32
    mar="--anchor $R/quality-0/lora --steps 40 --seed $s"
    run opd-merge-$s $(distill "$ALL") --init $R/merge/lora $mar
    run opd-kl-$s $(distill "$ALL") --init $R/merge/lora $mar --weighting kl
    run opd-guided-$s $(distill "$ALL" | guided) --init $R/merge/lora $mar
    run opd-none-$s $(distill "$ALL") --init none --rank 16 --alpha 32 $mar
    run opd-kl-none-$s $(distill "$ALL") --init none --rank 16 --alpha 32 $mar --weighting kl
    need sft-$s sft-kl-$s
    run opd-sft-$s $(distill "$ALL") --init $R/sft-$s/lora $mar
    run opd-kl-sft-$s $(distill "$ALL") --init $R/sft-kl-$s/lora $mar --weighting kl
    run mix-none-$s $(grpo "$ALL") $large --steps 5 --seed $s
    run mix-sft-$s $(grpo "$ALL") $large --init $R/sft-$s/lora --steps 5 --seed $s
    run mix-merge-$s $(grpo "$ALL") $large --init $R/merge/lora --steps 5 --seed $s

    # the same with teachers of its own seed: a teacher's luck is its student's
    need compose-$s ocr-$s scene-$s
    run merge-own-$s python cold_start.py merge --teachers $(teachers "$ALL" $s)
    need merge-own-$s
    run opd-own-$s $(distill "$ALL" $s) --init $R/merge-own-$s/lora $mar

    # MAR: without, with the base as anchor, and with the quality teacher at ten times the weight
    brief="--init $R/merge/lora --steps 24 --seed $s"
    run opd-noanchor-$s $(distill "$ALL") $brief --anchor none
    run opd-baseanchor-$s $(distill "$ALL") $brief --anchor base
    run opd-strong-$s $(distill "$ALL") $brief --anchor $R/quality-0/lora --anchor-weight 0.2
done

# -- what came of it, on test prompts ----------------------------------------------------------------------

singles=$(every_seed compose ocr scene stack2 mix)
cold_starts=$(every_seed sft sft-kl mix-{none,sft,merge})
students=$(every_seed opd-{none,sft,merge,own,kl,guided,kl-none,kl-sft})
anchors=$(every_seed opd-{noanchor,baseanchor,strong})
need $singles $cold_starts $students $anchors
scores="--reward toy.compose toy.ocr toy.scene toy.quality"
evaluate test --tasks $(files "$ALL" test) $scores --models base $(loras quality-0 merge) \
    compose-guided-0=$R/compose-0/lora,guidance=1.5 ocr-guided-0=$R/ocr-0/lora,guidance=1.5 \
    $(loras $singles $cold_starts $students) \
    $(for s in $SEEDS; do echo mix-guided-$s=$R/mix-$s/lora,guidance=1.5; done)
new="--samples-per-prompt 2 --models base $(loras compose-0 ocr-0 scene-0 quality-0 merge)"
new+=" $(loras $(every_seed mix opd-merge))"
evaluate new --tasks compose=toy/prompts/new_compose.txt ocr=toy/prompts/new_ocr.txt \
    --reward toy.compose toy.ocr toy.quality $new
evaluate both --tasks both=toy/prompts/new_both.txt --reward toy.ocr toy.scene toy.quality $new

# -- what the paper does not have: one change at a time ----------------------------------------------------
# 8 rollouts from the merge without an anchor; on validation prompts.

run merge-svd python cold_start.py merge --teachers $(teachers "$ALL") --method svd --rank 16
run merge-factors python cold_start.py merge --teachers $(teachers "$ALL") --method factors
need merge-svd merge-factors
for s in $SEEDS; do
    plain="--init $R/merge/lora --anchor none --steps 8 --seed $s"
    run try-default-$s $(distill "$ALL") $plain
    run try-ppo-$s $(distill "$ALL") $plain --objective ppo --clip-range 0.1 --lr 5e-4
    run try-ppo-paper-$s $(distill "$ALL") $plain --objective ppo-paper --clip-range 0.1 --lr 5e-4
    run try-kl-$s $(distill "$ALL") $plain --weighting kl
    run try-ode-$s $(distill "$ALL") $plain --sde ode
    run try-cps-$s $(distill "$ALL") $plain --sde cps
    # labelled steps are drawn anew for every rollout; DanceOPD draws one, from Beta(5, 2)
    run try-half-$s $(distill "$ALL") $plain --label-steps 4
    run try-one-$s $(distill "$ALL") $plain --label-steps 1
    run try-danceopd-$s $(distill "$ALL") $plain --label-steps 1 --label-density 5 2 --steps 20
    run try-alternate-$s $(distill "$ALL") $plain --schedule alternate
    run try-two-teachers-$s $(distill "compose ocr") $plain
    run try-one-teacher-$s $(distill compose) $plain
    run try-guided-$s $(distill "$ALL" 0 ,guidance=1.5) $plain
    run try-svd-$s $(distill "$ALL") $plain --init $R/merge-svd/lora
    run try-factors-$s $(distill "$ALL") $plain --init $R/merge-factors/lora
done
tries=$(every_seed try-{default,kl,ppo,ppo-paper,ode,cps,half,one,danceopd,alternate})
tries+=" $(every_seed try-{two-teachers,one-teacher,guided,svd,factors})"
need $tries
evaluate val --tasks $(files "$ALL" val) $scores --models base \
    $(loras compose-0 ocr-0 scene-0 merge merge-svd merge-factors $tries) \
    $(for t in $ALL; do echo $t-guided-0=$R/$t-0/lora,guidance=1.5; done) \
    $(for u in 08 16 24 32 40; do echo opd-after-$u=$R/opd-merge-0/checkpoints/0000$u/lora; done)
evaluate pairs --tasks $(files "$ALL" val) $scores --samples-per-prompt 2 --models base \
    $(loras quality-0 merge $(every_seed mix) $anchors) \
    $(for s in $SEEDS; do echo opd-anchor-$s=$R/opd-merge-$s/checkpoints/000024/lora; done)
python experiments/tables.py
