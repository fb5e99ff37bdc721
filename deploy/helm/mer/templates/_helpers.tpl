{{- define "mer.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "mer.selector" -}}
app.kubernetes.io/name: mer
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "mer.labels" -}}
{{ include "mer.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "mer.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}

{{- define "mer.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{ .Values.serviceAccount.name | default (include "mer.name" .) }}
{{- else -}}
{{ .Values.serviceAccount.name | default "default" }}
{{- end -}}
{{- end -}}

{{- define "mer.keysSecret" -}}
{{- if .Values.apiKeys.secret -}}
{{ .Values.apiKeys.secret }}
{{- else if .Values.apiKeys.keys -}}
{{ include "mer.name" . }}-keys
{{- end -}}
{{- end -}}

{{- /* Bytes of a quantity such as 8Gi; mer's own units are the same with a B. */ -}}
{{- define "mer.bytes" -}}
{{- $units := dict "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- $text := . | toString -}}
{{- $unit := regexFind "[KMGT]i$" $text -}}
{{- if $unit -}}
{{- mulf (trimSuffix $unit $text | float64) (get $units $unit) | int64 -}}
{{- else -}}
{{- $text -}}
{{- end -}}
{{- end -}}

{{- /* Of the values themselves, or of the part `shards` of them: both have ram, overhead and cpu. */ -}}
{{- define "mer.memory" -}}
{{- add (include "mer.bytes" .ram | int64) (include "mer.bytes" .overhead | int64) -}}
{{- end -}}

{{- /* What is served: the store that an init container makes, or the model by its name. */ -}}
{{- define "mer.model" -}}
{{- if eq .Values.model.fetch "convert" -}}
/models/{{ .Values.model.name | replace "/" "--" | replace ":" "--" }}-{{ .Values.model.convert.experts }}-{{ .Values.model.convert.dense }}
{{- else -}}
{{ .Values.model.name }}
{{- end -}}
{{- end -}}

{{- define "mer.scheme" -}}
{{- ternary "https" "http" (ne .Values.tls.secret "") -}}
{{- end -}}

{{- define "mer.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "mer.env" -}}
- name: HF_HOME
  value: /models/hub
{{- if .Values.model.hubTokenSecret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ .Values.model.hubTokenSecret }}
      key: token
{{- end }}
{{- with .Values.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "mer.resources" -}}
{{- $memory := include "mer.memory" . -}}
requests: {cpu: {{ .cpu | quote }}, memory: {{ $memory | quote }}}
limits:
  cpu: {{ .cpu | quote }}
  memory: {{ $memory | quote }}
{{- end -}}

{{- define "mer.mounts" -}}
- {name: models, mountPath: /models}
- {name: tmp, mountPath: /tmp}
{{- end -}}

{{- define "mer.claim" -}}
accessModes: [ReadWriteOnce]
{{- with .Values.storage.storageClass }}
storageClassName: {{ . }}
{{- end }}
resources:
  requests:
    storage: {{ .Values.storage.size }}
{{- end -}}

{{- /* Engines are a Deployment where shards hold experts and no claim stays with a pod, else a StatefulSet. */ -}}
{{- define "mer.kind" -}}
{{- ternary "Deployment" "StatefulSet" (and .Values.shards.enabled (ne .Values.storage.kind "persistent")) -}}
{{- end -}}

{{- /* Shards are not of the engines' services: another name, so that the selectors of these stay as they were. */ -}}
{{- define "mer.shardSelector" -}}
app.kubernetes.io/name: mer-shards
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "mer.podSecurity" -}}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: {{ .Values.seccomp.type }}
    {{- if eq .Values.seccomp.type "Localhost" }}
    localhostProfile: {{ required "seccomp.localhostProfile: name the profile on the nodes" .Values.seccomp.localhostProfile }}
    {{- end }}
{{- end -}}

{{- /* The model is fetched where there is a volume for it; resources: of whom it is fetched for. */ -}}
{{- define "mer.fetch" -}}
{{- with .root -}}
{{- if ne .Values.model.fetch "none" }}
initContainers:
  {{- $convert := eq .Values.model.fetch "convert" }}
  - name: pull
    image: {{ include "mer.image" . }}
    imagePullPolicy: {{ .Values.image.pullPolicy }}
    args: [pull, {{ .Values.model.name | quote }}]
    env:
      {{- include "mer.env" . | nindent 6 }}
    securityContext:
      {{- include "mer.containerSecurity" . | nindent 6 }}
    resources:
      {{- include "mer.resources" $.resources | nindent 6 }}
    volumeMounts:
      {{- include "mer.mounts" . | nindent 6 }}
  {{- if $convert }}
  - name: convert
    image: {{ include "mer.image" . }}
    imagePullPolicy: {{ .Values.image.pullPolicy }}
    # A store appears under its name only when it is whole; what is there already is kept.
    command: [sh, -c, 'test -e "$2" || exec mer convert "$1" "$2" --experts "$3" --dense "$4"', sh]
    args:
      - {{ .Values.model.name | quote }}
      - {{ include "mer.model" . | quote }}
      - {{ .Values.model.convert.experts | quote }}
      - {{ .Values.model.convert.dense | quote }}
    env:
      {{- include "mer.env" . | nindent 6 }}
    securityContext:
      {{- include "mer.containerSecurity" . | nindent 6 }}
    resources:
      {{- include "mer.resources" $.resources | nindent 6 }}
    volumeMounts:
      {{- include "mer.mounts" . | nindent 6 }}
  {{- end }}
{{- end }}
{{- end -}}
{{- end -}}

{{- define "mer.claims" -}}
{{- if eq .Values.storage.kind "persistent" -}}
volumeClaimTemplates:
  - metadata:
      name: models
    spec:
      {{- include "mer.claim" . | nindent 6 }}
{{- end -}}
{{- end -}}

{{- define "mer.storage" -}}
{{- if eq .Values.storage.kind "hostPath" }}
- name: models
  hostPath:
    path: {{ required "storage.hostPath: name the directory of the nodes" .Values.storage.hostPath }}
    type: Directory
{{- else if eq .Values.storage.kind "existingClaim" }}
- name: models
  persistentVolumeClaim:
    claimName: {{ required "storage.existingClaim: name the claim" .Values.storage.existingClaim }}
{{- else if eq .Values.storage.kind "ephemeral" }}
- name: models
  ephemeral:
    volumeClaimTemplate:
      spec:
        {{- include "mer.claim" . | nindent 8 }}
{{- end }}
{{- end -}}

{{- define "mer.peerMounts" -}}
- {name: peer, mountPath: /etc/mer/peer, readOnly: true}
- {name: peer-token, mountPath: /etc/mer/peer-token, readOnly: true}
{{- end -}}

{{- define "mer.peerVolumes" -}}
- name: peer
  secret: {secretName: {{ required "shards.tlsSecret: name a secret with ca.crt, tls.crt and tls.key (docs/kubernetes.md)" .Values.shards.tlsSecret }}, defaultMode: 0440}
- name: peer-token
  secret: {secretName: {{ required "shards.tokenSecret: name a secret with the key token (docs/kubernetes.md)" .Values.shards.tokenSecret }}, defaultMode: 0440}
{{- end -}}

{{- /* Where a NetworkPolicy lets out who fetches a model. */ -}}
{{- define "mer.fetching" -}}
- ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
    - {port: 443, protocol: TCP}
{{- end -}}
