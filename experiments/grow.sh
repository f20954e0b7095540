#!/usr/bin/env bash
# As tasks grow: one student of 1, 2, 4 and 8 LoRAs of the toy, three skills and five styles that pull their
# neighbours elsewhere. Merges, RL on all rewards (GRPO-Mix) with as many pictures as the teachers, Flow-OPD.
#
#     bash experiments/grow.sh            # what is done is skipped; a run that was cut off goes on
#     SEEDS=0 bash experiments/grow.sh
#
# Runs go to out/grow; grow.py then writes grow.json, grow.md, grow.png and grow_samples.png here.
set -eu
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 R=out/grow RANKS="4 8 16 32"
# Freed memory is kept for the next layer, not given back to the system.
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=2147483647
mkdir -p $R/prompts

run() {  # run NAME COMMAND...: once
    local name=$1
    shift
    if [ ! -e $R/$name.done ]; then
        if ! "$@" --out $R/$name > $R/$name.log 2>&1 || grep -q "stopped (--resume" $R/$name.log; then
            echo "$name failed: see $R/$name.log"
            exit 255  # xargs starts no other
        fi
        touch $R/$name.done
        echo "$(date +%H:%M) $name"
    fi
}
export -f run
both() { xargs -P2 -L1 bash -euc 'run "$@"' _; }  # lines NAME COMMAND..., two at a time, one thread each

# -- eight tasks, each with prompts of its own: a style has a part of a skill's ----------------------------
for split in train val test; do
    for task in ocr blue green red; do cp toy/prompts/${task}_$split.txt $R/prompts; done
    cp toy/prompts/scene_dawn_$split.txt $R/prompts/scene_$split.txt
    for part in "compose -v ^three" "dark -e ^three"; do
        set -- $part
        grep $2 $3 toy/prompts/compose_$split.txt > $R/prompts/$1_$split.txt
    done
    grep "^a pink" toy/prompts/ocr_$split.txt > $R/prompts/gold_$split.txt
    grep -v "^a pink" toy/prompts/ocr_$split.txt > $R/prompts/ocr_$split.txt
done

first() {  # first K SEED: the first K tasks in that seed's order, skills and styles by turns
    local orders=("compose blue scene red ocr green gold dark" "scene gold compose green ocr blue dark red"
        "ocr dark scene blue compose red green gold")
    echo ${orders[$2 % 3]} | cut -d ' ' -f 1-$1
}
files() { for t in $1; do echo $t=$R/prompts/${t}_$2.txt; done; }            # files TASKS SPLIT
loras() { for t in $1; do echo $t=$R/$t-$2/lora; done; }                     # loras TASKS SEED
twice() { sed 's/\(compose=[^ ]*\)/\1,weight=2/'; }                          # compose is the hardest
rewards() { for t in $1; do echo toy.$t; done; }                             # rewards TASKS
grpo() {  # grpo TASKS
    echo python train_teacher.py --resume auto --prompts $(files "$1" train | twice) --reward $(rewards "$1")
}
# A rollout is 16 prompts x 16 pictures and 4 updates for the hard task and what it takes part in, else half
small="--eval-prompts --batch-size 8 --updates-per-rollout 2 --lr 3e-3 --save-every 4"
large="--batch-size 16 --updates-per-rollout 4 --lr 2e-3 --save-every 4"
rollouts() {  # rollouts TASKS: of 256 pictures, as many as these teachers had
    local n=0 t
    for t in $1; do
        case $t in compose) n=$((n + 40));; ocr) n=$((n + 10));; *) n=$((n + 8));; esac
    done
    echo $((n / 2))
}

opd() {  # opd K SEED FLAGS...
    local tasks=$(first $1 $2)
    echo python distill.py --resume auto --eval-prompts --reward --compare --eval-every 1000 --save-every 15 \
        --keep 100 --teachers $(loras "$tasks" $2 | twice) --prompts $(files "$tasks" train) --seed $2 "${@:3}"
}
merge() {  # merge K SEED METHOD FLAGS...
    echo python cold_start.py merge --teachers $(loras "$(first $1 $2)" $2) --method "${@:3}"
}
students() {  # students K SEED: lines for `both`
    local tasks=$(first $1 $2)
    echo opd$1-$2 $(opd $1 $2 --steps $(($1 == 8 ? 120 : 60)))
    if [ $1 = 1 ]; then return; fi  # a merge or a mix of one is the teacher
    echo mix$1-$2 $(grpo "$tasks") $large --eval-prompts $(files "$tasks" val) --eval-every 6 \
        --steps $(rollouts "$tasks") --seed $2
    echo svd$1-$2 $(merge $1 $2 svd --rank 16 --scale $1)
    for density in 2 3 5; do echo ties$density-$1-$2 $(merge $1 $2 ties --density .$density); done
    for density in 3 5; do echo dare$density-$1-$2 $(merge $1 $2 dare_ties --density .$density); done
}
after() { echo $R/opd$1-$2/checkpoints/$(printf %06d $3)/lora; }             # after K SEED UPDATES
merges() {  # merges K SEED: NAME=LORA of those to choose from
    local t strength density loras
    for strength in $(case $1 in 2) echo .5;; 4) echo .25;; 8) echo .125;; esac) .35 .7 1; do
        loras=$(for t in $(first $1 $2); do echo +$R/$t-$2/lora,scale=$strength; done | tr -d '\n')
        echo sum${strength#.}=${loras#+}
    done
    for strength in .5 1; do
        echo svd${strength#.}=$R/svd$1-$2/lora,scale=$strength
        echo dare5_${strength#.}=$R/dare5-$1-$2/lora,scale=$strength
    done
    echo dare3=$R/dare3-$1-$2/lora
    for density in 2 3 5; do echo ties$density=$R/ties$density-$1-$2/lora; done
}
evaluate() {  # evaluate FOLDER TASKS SPLIT NAME=LORA...: with both cores
    local out=$R/$1 prompts=$(files "$2" $3) scores=$(rewards "$2")
    shift 3
    torchrun --nproc_per_node=2 evaluate.py --eval-num-steps 10 --eval-batch-size 128 --out $out \
        --tasks $prompts --reward $scores --models "$@" > $out.log 2>&1 || { cat $out.log; exit 1; }
    echo "$(date +%H:%M) $out"
}

for s in ${SEEDS:-0 1 2}; do
    # -- stage 1: teachers ---------------------------------------------------------------------------------
    for t in $(first 8 $s); do
        case $t in
            compose) echo $t-$s $(grpo $t) $large --eval-prompts --steps 20 --seed $s;;
            ocr) echo $t-$s $(grpo $t) $small --steps 10 --seed $s;;
            *) echo $t-$s $(grpo $t) $small --steps 8 --seed $s;;
        esac
    done | both
    for t in $(first 8 $s); do
        for split in val test; do
            echo own-$t-$split-$s python evaluate.py --eval-num-steps 10 --eval-batch-size 128 \
                --tasks $(files $t $split) --reward toy.$t --models base $t=$R/$t-$s/lora
        done
    done | both

    # -- merges, mixes, students, also of smaller ranks; then ten rollouts of the mix from each student ----
    for k in 8 4 2 1; do students $k $s; done | both
    for rank in $RANKS; do echo start$rank-$s $(merge 8 $s svd --rank $rank | twice); done | both
    for rank in $RANKS; do echo rank$rank-$s $(opd 8 $s --init $R/start$rank-$s/lora --steps 120); done | both
    for k in 2 4 8; do
        echo up$k-$s $(grpo "$(first $k $s)") $large --eval-prompts --init $(after $k $s $((15 * k))) \
            --steps 10 --seed $s
    done | both

    # -- scores; merges are chosen on validation prompts ---------------------------------------------------
    for k in 1 2 4 8; do
        tasks=$(first $k $s) chosen=""
        updates=$(seq 15 15 $((15 * k)))
        evaluate val-$k-$s "$tasks" val $(for u in $updates; do echo after$u=$(after $k $s $u); done) \
            $([ $k = 1 ] || merges $k $s)
        models="opd=$(after $k $s $((15 * k))) fixed=$(after $k $s 60)"
        if [ $k = 8 ]; then models+=" $(for rank in $RANKS; do echo rank$rank=$R/rank$rank-$s/lora; done)"; fi
        if [ $k -gt 1 ]; then
            models+=" mix=$R/mix$k-$s/lora up=$R/up$k-$s/lora"
            for name in $(python experiments/grow.py --choose $k $s); do
                chosen+=" $(merges $k $s | grep "^$name=")"
            done
        fi
        evaluate test-$k-$s "$tasks" test $models $chosen
    done
    python experiments/grow.py
done
