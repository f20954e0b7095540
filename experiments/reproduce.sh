#!/usr/bin/env bash
# The paper's experiments in miniature, from the shipped base to the tables and figures beside this file:
# plain commands of this repository's scripts, two at a time, one thread each. What is done already is
# skipped, and what was killed goes on where it was.
#
#     bash experiments/reproduce.sh     # two CPU cores; runs and pictures go to out/reproduce
#     SEEDS=0 bash experiments/reproduce.sh     # one seed instead of three
#     bash experiments/reproduce.sh more        # and merges without training, and stronger teachers
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
# Freed memory is kept for the next layer, not given back to the system.
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=2147483647
R=out/reproduce
ALL="compose ocr scene"
SEEDS=${SEEDS:-0 1 2}
first=${SEEDS%% *}
part=${1-}
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
    local name=$1 resume="--resume auto"
    shift
    if [[ "$*" == *"cold_start.py merge"* ]]; then
        resume=""  # it takes a second
    fi
    if [ -e $R/$name.done ] || [[ " $started " == *" $name "* ]]; then
        return
    fi
    started+=" $name"
    while (( $(jobs -rp | wc -l) >= 2 )); do
        pause
    done
    echo "$(date +%H:%M) $name"
    {
        if "$@" --out $R/$name $resume > $R/$name.log 2>&1 \
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
guided() { sed 's/\(compose\|ocr\)=[^ ]*lora/&,guidance=1.5/g'; }             # whom guidance helps
stronger() { sed "s#/lora#&,scale=$1#g"; }                                   # stronger STRENGTH
rewards() { for t in $1; do echo toy.$t=$2; done; }                          # rewards TASKS WEIGHT

teachers() {  # teachers KIND SEED: KIND is "" or the reward that they were trained with besides
    for t in $ALL; do
        echo $t=$R/$t$1-$2/lora
    done | twice
}

grpo() {  # grpo TASKS REWARDS
    echo python train_teacher.py --prompts $(files "$1" train | twice) --eval-prompts $(files "$1" val) \
        --reward $2 --save-every 4 --eval-every 4
}

distill() {  # distill TEACHERS: no table at the end
    echo python distill.py --teachers $1 --prompts $(files "$ALL" train) --eval-prompts --reward --compare \
        --batch-size 32 --micro-batch-size 32 --label-steps 0 --ema 0.1 --eval-every 1000 \
        --save-every 4 --keep 100
}

# A rollout is 16 prompts x 16 pictures and 4 updates for the hard task and what it takes part in, else half.
small="--batch-size 8 --updates-per-rollout 2 --lr 3e-3"
large="--batch-size 16 --updates-per-rollout 4 --lr 2e-3"
cat toy/prompts/{compose,ocr,scene}_train.txt > $R/all_train.txt

for s in $SEEDS; do
    # -- stage 1: teachers ---------------------------------------------------------------------------------
    # Each on its own reward (kind ""), and on 0.8 of it and 0.2 of a task-agnostic one (q: quality, which
    # helps the tasks; c: calm, which conflicts with them); and the two teachers of those, on all prompts
    run compose-$s $(grpo compose toy.compose) $large --steps 32 --seed $s
    run ocr-$s $(grpo ocr toy.ocr) $small --steps 16 --seed $s
    run scene-$s $(grpo scene toy.scene) $small --steps 12 --seed $s
    run quality-$s $(grpo "$ALL" toy.quality) $small --eval-every 8 --steps 8 --seed $s
    run calm-$s $(grpo "$ALL" toy.calm) $small --eval-every 8 --steps 8 --seed $s
    for kind in q=quality c=calm; do
        k=${kind%=*} besides=toy.${kind#*=}=0.2
        run compose$k-$s $(grpo compose "toy.compose=0.8 $besides") $large --steps 32 --seed $s
        run ocr$k-$s $(grpo ocr "toy.ocr=0.8 $besides") $small --steps 16 --seed $s
        run scene$k-$s $(grpo scene "toy.scene=0.8 $besides") $small --steps 12 --seed $s
    done

    # -- the baseline: GRPO-Mix, with as many pictures and updates as the teachers together ----------------
    # without quality; with it as the paper's text has it, 1:1, and its code, 0.8 and 0.2, mixed and in whole
    # rollouts of one task in turn; with calm at four weights; and on two of the tasks. With the first seed
    # 1:1 was the best of the three on validation prompts: the others, and two weights of calm, have no other
    run mix-$s $(grpo "$ALL" "$(rewards "$ALL" 1)") $large --steps 46 --seed $s
    run mixq1-$s $(grpo "$ALL" "$(rewards "$ALL" 1) toy.quality=1") $large --steps 46 --seed $s
    for w in 0.25 1; do
        run mixcalm${w/./}-$s $(grpo "$ALL" "$(rewards "$ALL" 1) toy.calm=$w") $large --steps 46 --seed $s
    done
    if [ $s = $first ]; then
        parts="$(rewards "$ALL" 0.8) toy.quality=0.2"
        run mixq-$s $(grpo "$ALL" "$parts") $large --steps 46 --seed $s
        run mixturns-$s $(grpo "$ALL" "$parts") $large --steps 46 --seed $s --schedule alternate
        for w in 0.5 2; do
            run mixcalm${w/./}-$s $(grpo "$ALL" "$(rewards "$ALL" 1) toy.calm=$w") $large --steps 46 --seed $s
        done
    fi
    run stack2-$s $(grpo "ocr scene" "$(rewards "ocr scene" 1)") $small --eval-every 7 --steps 28 --seed $s

    # -- stage 2: cold starts ------------------------------------------------------------------------------
    need $(for t in compose ocr scene; do echo $t-$s ${t}q-$s ${t}c-$s; done) quality-$s calm-$s
    for k in "" q c; do
        run merge$k-$s python cold_start.py merge --teachers $(teachers "$k" $s)
    done
    run sft-$s python cold_start.py sft --teachers $(teachers "" $s) --prompts $(files "$ALL" train) \
        --batch-size 32 --micro-batch-size 32 --ema 0.1 --save-every 4 --steps 24 --seed $s
    need merge-$s mergeq-$s mergec-$s sft-$s

    # -- stage 3: Flow-OPD, 40 updates of 32 pictures, each with the teachers of its seed ------------------
    steps="--steps 40 --seed $s"
    start="--init $R/merge-$s/lora"
    opd=$(distill "$(teachers "" $s)")
    run opd-$s $opd $start $steps --anchor $R/quality-$s/lora
    run opdsft-$s $opd --init $R/sft-$s/lora $steps --anchor $R/quality-$s/lora
    run opdnone-$s $opd --init none --rank 16 --alpha 32 $steps --anchor $R/quality-$s/lora
    run opdguided-$s $(distill "$(teachers "" $s | guided)") $start $steps --anchor $R/quality-$s/lora
    run opdstrong-$s $opd $start $steps --anchor $R/quality-$s/lora --anchor-weight 0.2
    run opdq-$s $(distill "$(teachers q $s)") --init $R/mergeq-$s/lora $steps --anchor none
    # The same number of pictures for GRPO-Mix: 5 rollouts of 256
    run mixnone-$s $(grpo "$ALL" "$(rewards "$ALL" 1)") $large --steps 5 --seed $s
    run mixsft-$s $(grpo "$ALL" "$(rewards "$ALL" 1)") $large --init $R/sft-$s/lora --steps 5 --seed $s
    run mixmerge-$s $(grpo "$ALL" "$(rewards "$ALL" 1)") $large $start --steps 5 --seed $s

    # -- the front: calm as an anchor, in the teachers, and as one more task -------------------------------
    run opdcalm0-$s $opd $start $steps --anchor none
    for w in 0.02 0.1 0.3 1; do
        run opdcalm${w/./}-$s $opd $start $steps --anchor $R/calm-$s/lora --anchor-weight $w
    done
    run opdc-$s $(distill "$(teachers c $s)") --init $R/mergec-$s/lora $steps --anchor none
    run opdrouted-$s $(distill "$(teachers "" $s) calm=$R/calm-$s/lora") $start $steps --anchor none \
        --prompts $(files "$ALL" train) calm=$R/all_train.txt

    # -- the way up: ten rollouts of GRPO-Mix from Flow-OPD's student, its KL to the base or to the teachers
    need opdcalm0-$s
    for reward in quality calm; do
        up="$(grpo "$ALL" "$(rewards "$ALL" 1) toy.$reward=1") $large --init $R/opdcalm0-$s/lora --steps 10"
        run up$reward-$s $up --seed $s
        run upkl$reward-$s $up --seed $s --teachers $(teachers "" $s | sed 's/,weight=2//')
    done

    # -- other methods, at as many pictures, without an anchor of their own --------------------------------
    run paper-$s $opd $start $steps --anchor none --weighting kl
    run released-$s $opd $start $steps --weighting kl-dt --schedule alternate --anchor base \
        --anchor-weight 0.04
    run diffusionopd-$s $opd $start $steps --anchor none --sde ode --weighting dt2 --schedule alternate
    run danceopd-$s $opd $start $steps --anchor none --sde ode --label-steps 1 --label-density 5 2

    # -- one change at a time, 8 rollouts ------------------------------------------------------------------
    plain="$start --anchor none --steps 8 --seed $s"
    run try-$s $opd $plain
    run tryppo-$s $opd $plain --objective ppo --clip-range 0.1 --lr 5e-4
    run trypaper-$s $opd $plain --objective ppo-paper --clip-range 0.1 --lr 5e-4
    run trykl-$s $opd $plain --weighting kl
    run tryode-$s $opd $plain --sde ode
    run trycps-$s $opd $plain --sde cps
    run tryhalf-$s $opd $plain --label-steps 4
    run tryone-$s $opd $plain --label-steps 1
    run tryturns-$s $opd $plain --schedule alternate
done

# -- three seeds' compose teachers in one student: more than any of them? ----------------------------------
set -- $SEEDS
if [ $# = 3 ]; then
    several=$(for s; do echo compose$s=$R/compose-$s/lora; done)
    prompts=$(for s; do echo compose$s=toy/prompts/compose_train.txt; done)
    run mergeall python cold_start.py merge --teachers $several
    need mergeall
    for s; do
        run ensemble-$s python distill.py --teachers $several --prompts $prompts --init $R/mergeall/lora \
            --anchor none --eval-prompts --reward --compare --batch-size 32 --micro-batch-size 32 \
            --label-steps 0 --ema 0.1 --eval-every 1000 --save-every 4 --keep 100 --steps 40 --seed $s
    done
    need $(every_seed ensemble)
fi

# -- more: merges without training; stronger teachers ------------------------------------------------------
merges="" more="" chosen="" pairs="" strong=""
if [ "$part" = more ]; then
    for s in $SEEDS; do
        # 0.5, 0.7 and 1 times the sum; TIES. tables.py shows the best of each kind on validation prompts
        plain="python cold_start.py merge --teachers $(teachers "" $s | sed 's/,weight=2//')"
        for scale in 1.5 2.1 3; do
            run sum${scale/./}-$s $plain --scale $scale
            run svd${scale/./}-$s $plain --scale $scale --method svd --rank 16
        done
        for density in 2 3 5; do
            run ties$density-$s $plain --method ties --density .$density
            run dare$density-$s $plain --method dare_ties --density .$density
        done
        # The teachers' LoRAs at 1.25 and 1.5; at 1.25 guided too, and then the way up
        alone="--init $R/merge-$s/lora --steps 40 --seed $s --anchor none"
        run opdbest-$s $(distill "$(teachers "" $s | guided | stronger 1.25)") $alone
        run opdx125-$s $(distill "$(teachers "" $s | stronger 1.25)") $alone
        run opdx15-$s $(distill "$(teachers "" $s | stronger 1.5)") $alone
        need opdbest-$s
        run upbest-$s $(grpo "$ALL" "$(rewards "$ALL" 1) toy.quality=1") $large --init $R/opdbest-$s/lora \
            --steps 10 --seed $s
    done
    merges=$(every_seed {sum,svd}{15,21,3} {ties,dare}{2,3,5}) more=$(every_seed opd{x125,x15,best} upbest)
fi

# -- what came of it ---------------------------------------------------------------------------------------

mixes="$(every_seed mix mixq1 mixcalm{025,1} stack2 mix{none,sft,merge})"
mixes+=" $(for arm in mixq mixturns mixcalm05 mixcalm2; do echo $arm-$first; done)"
students=$(every_seed sft merge opd{,sft,none,guided,strong,q,c,routed} opdcalm{0,002,01,03,1})
ups=$(every_seed up{,kl}{quality,calm})
others=$(every_seed paper released diffusionopd danceopd)
tries=$(every_seed try{,ppo,paper,kl,ode,cps,half,one,turns})
singles=$(every_seed {compose,ocr,scene}{,q,c} quality calm)
need $singles $mixes $students $ups $others $tries $merges $more
scores="--reward toy.compose toy.ocr toy.scene toy.quality toy.calm"
evaluate val --tasks $(files "$ALL" val) $scores --models base $(loras $tries) \
    $(loras $(every_seed $ALL mix mixq1 merge opd) mixq-$first mixturns-$first $merges) \
    $(for s in $SEEDS; do for u in 04 08 16 24 32; do
        echo opdafter$u-$s=$R/opd-$s/checkpoints/0000$u/lora
    done; done)
if [ "$part" = more ]; then
    best=$(python experiments/tables.py --merges)
    chosen=$(every_seed $best) pairs="$more $(every_seed opdguided upquality)"
    strong=$(for s in $SEEDS; do for t in $ALL; do for strength in 1.25 1.5; do
        echo ${t}x${strength/./}-$s=$R/$t-$s/lora,scale=$strength
    done; done; done)
fi
evaluate test --tasks $(files "$ALL" test) $scores --models base $(loras $singles $mixes $students $ups) \
    $(loras $others $more $chosen) $(if [ -e $R/ensemble-0.done ]; then loras mergeall $(every_seed ensemble); fi) \
    $(for s in $SEEDS; do for t in compose ocr; do
        echo ${t}guided-$s=$R/$t-$s/lora,guidance=1.5
    done; done) $strong
new="--samples-per-prompt 2 --models base $(loras $(every_seed compose ocr scene mixq1 opd))"
evaluate new --tasks compose=toy/prompts/new_compose.txt ocr=toy/prompts/new_ocr.txt \
    --reward toy.compose toy.ocr toy.quality $new
evaluate both --tasks both=toy/prompts/new_both.txt --reward toy.ocr toy.scene toy.quality $new
evaluate pairs --tasks $(files "$ALL" val) $scores --samples-per-prompt 2 \
    --models base $(loras $(every_seed quality mixq1 opdcalm0 opd opdstrong) $pairs)
python experiments/tables.py
