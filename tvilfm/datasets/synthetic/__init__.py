"""The synthetic tri-modal benchmark: rendered pedestrians with captions.

Every person is a combination of attributes. Some attributes are visible in infrared (sex, hair style, garments,
pattern, bag, hat). Together they are the person's *archetype*. There are only 24 archetypes, so every 24th person looks
the same to an infrared camera. The other attributes are colours, which are only in visible images and visible captions.
Infrared retrieval is therefore ambiguous by construction, and text can resolve the ambiguity. A method that ignores the
text cannot do better than the archetypes allow.

The brightness of a garment in infrared is a mixture of its visible luminance and a random constant of its material,
which is fixed for the person. Infrared images of one person therefore match each other (infrared-to-infrared retrieval
works), but their brightness contains little information about colour.

Captions describe the *rendered image* with the errors of real captioners: missing attributes, wrong attributes,
synonyms and filler words. The files on disk have the exact layout of SYSU-MM01, RegDB, LLCM or a folder of your own
images, including the published caption files, so the reader of the real dataset reads them.
"""
