# Ablation, the gate: fixed at 0.5 (38.2 claimed).
#   python train.py config/ablate_gate_fixed.py
exec(open('config/hsvdet_coco20.py').read())
out_dir = 'out/ablate_gate_fixed'
gate = 'fixed'
