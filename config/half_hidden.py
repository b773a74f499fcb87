# Context needed in part: half of the discs show their colour, which is their class; the others are white, and only
# coloured discs or the cue show it. Blocks learn that, convolutions of as many parameters do not:
#   python train.py config/half_hidden.py
#   python train.py config/half_hidden.py --attn=--- --out_dir=out/half_hidden_without
# hardware: one CPU core, about 6 minutes a run; AP: RESULTS.md, "does global context help?", where T found it with each
# of five seeds; so does -SS with --lr_block=3, without it in three of five
exec(open('config/long_range.py').read())
out_dir = 'out/half_hidden'
attn = '-TT'                 # tokens only: S without its dense path
make_data = 'half_hidden'
train_data = 'data/half_hidden/train.json'
val_data = 'data/half_hidden/val.json'

epochs = 2
batch_size = 8
optimizer = 'muon'
lr = 15e-3
momentum = 0.95
ema_tau = 100
