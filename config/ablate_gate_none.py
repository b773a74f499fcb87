# Ablation, the gate: none, direct addition (37.9 claimed).
#   python train.py config/ablate_gate_none.py
exec(open('config/hsvdet_coco20.py').read())
out_dir = 'out/ablate_gate_none'
gate = 'none'
