"""The commands of `fastcifar`, one module each; heavy imports happen inside the functions."""
