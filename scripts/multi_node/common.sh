# What the scripts of this folder share; they source it: run_gpt2_124M.sh on two nodes of 8 GPUs, with steps of four
# times as many tokens. They start the run once and do not try again.
source "$(dirname "${BASH_SOURCE[0]}")/../run_common.sh"
NPROC=16
memory=80
data="llmc-data fineweb makes them; other data: -i and -j"
flags=(
  -e d12
  -i 'dev/data/fineweb10B/fineweb_train_*.bin'
  -j 'dev/data/fineweb10B/fineweb_val_*.bin'
  -o log_gpt2_124M_multi
  -v 250     # validate every so many steps,
  -h 1       # with HellaSwag, where its file is there
  -s 20000   # sample at the end only,
  -g 144     # so many tokens
  -b 64      # rows a pass and GPU: with less memory lower this alone, -d stays
  -t 1024    # tokens a row
  -d 2097152 # tokens a step, on all GPUs together
  -r 0       # recompute nothing
  -z 1       # optimizer state cut over the GPUs
  -c 0.1     # weight decay
  -l 0.0006  # highest learning rate, after
  -u 700     # so many steps,
  -q 0.0     # falling to this part of it
  -n 1000    # checkpoint every so many steps
  -y 1       # go on from the newest checkpoint
  -x 4716    # an epoch
)
