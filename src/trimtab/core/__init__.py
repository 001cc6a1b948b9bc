"""Where methods, formats, updates and families meet. From the ground up, each group importing only from those above it:

ground       errors registry files tensor_file machine · rows scratch remake swap modes · product
contracts    format code (one stored weight) · transform · batch site (Site, Base) method start blocks activation
arithmetic   bits sparse spectrum frozen gated low_rank mask positions fake_quantized rounded
finding      modules family (tables) guess (no table) places select (the `where` language)
stored       mapped quantized calibrate codes activations
attached     delta deltas grouped (rows with adapters of their own) state stack (virtual tokens) hosts raw attention
             install taken part draw attach · fisher prune merge save as_lora settle
updated      optimizer active
"""
