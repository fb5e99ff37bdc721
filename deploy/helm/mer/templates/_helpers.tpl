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

{{- define "mer.memory" -}}
{{- add (include "mer.bytes" .Values.ram | int64) (include "mer.bytes" .Values.overhead | int64) -}}
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
requests: {cpu: {{ .Values.cpu | quote }}, memory: {{ $memory | quote }}}
limits:
  cpu: {{ .Values.cpu | quote }}
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
